"""Gates: the limits, and that nothing unknown ever passes."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.gates import GateReport, GateRules, TaskRules, judge
from hydraopt.evaluation.result import Evaluation


def score(value: float, task: str = "t", **changes: object) -> Evaluation:
    values = {
        "task": task,
        "metric": "accuracy",
        "value": value,
        "low": 0.0,
        "high": 1.0,
        "samples": 100,
        "metrics": {"accuracy": value},
        "data_digest": "d" * 64,
    }
    return Evaluation.model_validate(values | changes)


def report(own: dict, merged: dict, rules: GateRules | None = None, ratio: float = 0.2) -> GateReport:
    return judge(rules or GateRules(), bundle_id="b" * 64, storage_ratio=ratio, own=own, merged=merged)


def failed(result: GateReport) -> set[tuple[str, str]]:
    return {(verdict.rule, verdict.subject) for verdict in result.verdicts if not verdict.passed}


BUNDLE = "b" * 64


def test_a_good_bundle_passes_every_rule():
    result = report({"t": score(0.9)}, {"t": score(0.895)})
    assert result.passed
    assert failed(result) == set()
    assert {verdict.rule for verdict in result.verdicts} == {
        "max_storage_ratio",
        "tasks",
        "min_samples",
        "max_task_drop_percent",
        "max_mean_drop_percent",
    }
    comparison = result.tasks["t"]
    assert (comparison.own, comparison.merged, comparison.samples, comparison.metric) == (
        0.9,
        0.895,
        100,
        "accuracy",
    )
    assert comparison.drop_percent == pytest.approx(100 * 0.005 / 0.9)


def test_a_drop_is_relative_and_its_limit_itself_passes():
    rules = GateRules(max_task_drop_percent=5, max_mean_drop_percent=5)
    assert report({"t": score(0.8)}, {"t": score(0.76)}, rules).passed  # 5.000000000000004 in floats
    worse = report({"t": score(0.8)}, {"t": score(0.7599)}, rules)
    assert failed(worse) == {("max_task_drop_percent", "t"), ("max_mean_drop_percent", BUNDLE)}


def test_one_bad_task_fails_even_if_the_mean_is_good():
    own = {name: score(0.8, name) for name in "abcdefgh"}
    merged = {name: score(0.82 if name != "h" else 0.7, name) for name in own}
    assert failed(report(own, merged)) == {("max_task_drop_percent", "h")}


def test_many_small_drops_fail_the_mean():
    own = {name: score(0.8, name) for name in "abc"}
    merged = {name: score(0.78, name) for name in "abc"}
    assert failed(report(own, merged)) == {("max_mean_drop_percent", BUNDLE)}


def test_the_mean_counts_gains():
    result = report(
        {"a": score(0.8, "a"), "b": score(0.5, "b")}, {"a": score(0.78, "a"), "b": score(0.52, "b")}
    )
    assert result.mean_drop_percent == pytest.approx((2.5 - 4.0) / 2)
    assert result.passed


@pytest.mark.parametrize("ratio", [0.2501, 7.0, 0.0, -0.1, math.nan, math.inf])
def test_storage_above_the_limit_or_no_ratio_fails(ratio):
    result = report({"t": score(0.9)}, {"t": score(0.9)}, ratio=ratio)
    assert failed(result) == {("max_storage_ratio", BUNDLE)}
    assert not result.passed


def test_a_storage_ratio_at_its_limit_passes():
    """0.1 + 0.2 is 0.30000000000000004 in floats."""
    limit = GateRules(max_storage_ratio=0.3)
    assert report({"t": score(0.9)}, {"t": score(0.9)}, limit, ratio=0.1 + 0.2).passed


@pytest.mark.parametrize("side", ["own", "merged"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -0.5, 1.5])
def test_a_missing_or_impossible_score_fails_its_task_and_the_mean(side, value):
    sides = {"own": {"t": score(0.9)}, "merged": {"t": score(0.9)}}
    sides[side] = {"t": None if value is None else score(value)}
    result = report(**sides)
    assert {("max_task_drop_percent", "t"), ("max_mean_drop_percent", BUNDLE)} <= failed(result)
    assert result.tasks["t"].drop_percent is None
    assert result.mean_drop_percent is None
    json.loads(result.canonical())  # no NaN in it


def test_a_task_without_a_score_leaves_no_mean_of_the_others():
    good = {"a": score(0.9, "a")}
    result = report(good | {"b": None}, good | {"b": score(0.9, "b")})
    assert result.mean_drop_percent is None
    assert ("max_mean_drop_percent", BUNDLE) in failed(result)


@pytest.mark.parametrize(("own", "merged"), [({"t": score(0.9)}, {}), ({}, {"t": score(0.9)})])
def test_a_task_one_side_never_measured_fails(own, merged):
    assert ("max_task_drop_percent", "t") in failed(report(own, merged))


def test_no_task_at_all_fails():
    assert {("tasks", BUNDLE), ("max_mean_drop_percent", BUNDLE)} == failed(report({}, {}))


@pytest.mark.parametrize(
    "changes",
    [{"data_digest": "e" * 64}, {"metric": "macro_f1"}, {"samples": 99}, {"task": "other"}, {"rules": "0"}],
)
def test_scores_that_cannot_be_compared_fail(changes):
    result = report({"t": score(0.9)}, {"t": score(0.9, **changes)})
    assert ("max_task_drop_percent", "t") in failed(result)
    assert "not comparable" in next(v.reason for v in result.verdicts if v.rule == "max_task_drop_percent")


def test_too_few_rows_fail():
    result = report({"t": score(0.9, samples=49)}, {"t": score(0.9, samples=49)})
    assert failed(result) == {("min_samples", "t")}


@pytest.mark.parametrize("merged", [0.0, 0.3])
def test_a_task_that_scored_nothing_has_nothing_to_lose(merged):
    result = report({"t": score(0.0)}, {"t": score(merged)})
    assert result.passed
    assert result.tasks["t"].drop_percent == 0


def test_a_small_score_can_be_lost_whole():
    result = report({"t": score(0.008)}, {"t": score(0.0)})
    assert result.tasks["t"].drop_percent == 100
    assert ("max_task_drop_percent", "t") in failed(result)


def test_a_task_may_have_limits_of_its_own():
    own, merged = {"t": score(0.8, samples=40)}, {"t": score(0.74, samples=40)}
    lenient = GateRules(max_mean_drop_percent=10, tasks={"t": TaskRules(max_drop_percent=10, min_samples=40)})
    assert report(own, merged, lenient).passed
    strict = GateRules(tasks={"t": TaskRules(max_drop_percent=0)})
    assert failed(report({"t": score(0.9)}, {"t": score(0.899)}, strict)) == {("max_task_drop_percent", "t")}


def test_limits_for_a_task_that_is_not_there_fail_since_the_name_may_be_misspelt():
    rules = GateRules(tasks={"tt": TaskRules(max_drop_percent=0)})
    result = report({"t": score(0.9)}, {"t": score(0.9)}, rules)
    assert failed(result) == {("tasks", BUNDLE)}
    assert any("tt" in verdict.reason for verdict in result.verdicts)


values = st.one_of(st.none(), st.floats(), st.floats(0, 1))


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.tuples(values, values), max_size=3), st.floats())
def test_whatever_was_measured_gives_the_same_whole_report(measured, ratio):
    own = {name: None if pair[0] is None else score(pair[0], name) for name, pair in measured.items()}
    merged = {name: None if pair[1] is None else score(pair[1], name) for name, pair in measured.items()}
    first = report(own, merged, ratio=ratio)
    second = report(dict(reversed(own.items())), dict(reversed(merged.items())), ratio=ratio)

    assert first.canonical() == second.canonical()
    assert first.digest == hashlib.sha256(first.canonical()).hexdigest()
    assert GateReport.model_validate_json(first.canonical()) == first
    finite = all(v is not None and 0 <= v <= 1 for pair in measured.values() for v in pair)
    assert not (first.passed and (not finite or not measured))


def test_the_digest_covers_the_verdict():
    good = report({"t": score(0.9)}, {"t": score(0.9)})
    other = report({"t": score(0.9)}, {"t": score(0.899)})
    assert good.digest != other.digest


def test_rules_are_read_from_yaml(tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text("max_storage_ratio: 0.3\ntasks:\n  t: {max_drop_percent: 2}\n")
    rules = GateRules.load(path)
    assert (rules.max_storage_ratio, rules.tasks["t"].max_drop_percent, rules.min_samples) == (0.3, 2, 50)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_storage: 0.3\n", "max_storage is not a known key"),
        ("max_storage_ratio: 0\n", "max_storage_ratio.*found 0"),
        ("max_task_drop_percent: .nan\n", "max_task_drop_percent.*nan"),
        ("tasks: {t: {max_drop: 1}}\n", "tasks.t.max_drop is not a known key"),
        ("min_samples: 5\nmin_samples: 6\n", "'min_samples' stands twice"),
        ("min_samples: yes\n", "min_samples: expected a number.*True"),
        ("tasks: {t: {max_drop_percent: off}}\n", "tasks.t.max_drop_percent: expected a number.*False"),
    ],
)
def test_wrong_rules_are_told_with_the_key_and_the_value(tmp_path, text, words):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(TaskFileError, match=f"gates.yaml: .*{words}"):
        GateRules.load(path)
