"""The text files for Prometheus, read back by its own parser."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("prometheus_client")

from managers import measured
from prometheus_client.parser import text_string_to_metric_families

from hydraopt.evaluation.gates import GateRules, judge
from infra import metrics
from infra.metrics import note_behind, note_reconcile, write_candidate, write_merge


def read(home):
    """Every sample of every file: value by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for path in (home / "metrics").glob("*.prom")
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)`` sets the time."""
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "time", lambda: now[0])

    def put(value):
        now[0] = float(value)

    return put


def test_lag_counts_from_when_a_change_was_first_seen(tmp_path, clock):
    """Not from the last of several runs that failed to merge it, and up to the candidate."""
    of = ("bundle", "b")
    for now in (1000, 1300):
        clock(now)
        note_behind(tmp_path, "b", behind=True)
        clock(now + 10)
        note_reconcile(tmp_path, seconds=10, bundles=None)
    found = read(tmp_path)
    assert found["hydraopt_reconcile_behind_since_timestamp_seconds", of] == 1000
    assert found["hydraopt_reconcile_lag_seconds", of] == 310
    assert ("hydraopt_reconcile_last_success_timestamp_seconds",) not in found
    clock(1400)
    note_behind(tmp_path, "b", behind=False)
    note_reconcile(tmp_path, seconds=2, bundles=["b"])
    found = read(tmp_path)
    assert found["hydraopt_reconcile_behind_since_timestamp_seconds", of] == 0
    assert found["hydraopt_reconcile_lag_seconds", of] == 0
    assert found["hydraopt_reconcile_catch_up_seconds", of] == 400
    assert found["hydraopt_reconcile_last_success_timestamp_seconds",] == 1400


def test_a_failure_leaves_the_last_success(tmp_path, clock):
    note_reconcile(tmp_path, seconds=1, bundles=[])
    clock(2000)
    note_reconcile(tmp_path, seconds=3, bundles=None)
    found = read(tmp_path)
    assert found["hydraopt_reconcile_last_success_timestamp_seconds",] == 1000
    assert found["hydraopt_reconcile_last_run_timestamp_seconds",] == 2000
    assert found["hydraopt_reconcile_seconds",] == 3


def test_a_bundle_that_is_gone_is_no_longer_told_of(tmp_path):
    """But a failed run, which may not have seen all, forgets none."""
    for name in ("a", "b"):
        note_behind(tmp_path, name, behind=True)
    note_reconcile(tmp_path, seconds=1, bundles=None)
    assert {labels[1] for _, *rest in read(tmp_path) for labels in rest} == {"a", "b"}
    note_reconcile(tmp_path, seconds=1, bundles=["b"])
    assert {labels[1] for _, *rest in read(tmp_path) for labels in rest} == {"b"}


class Manifest:
    """As much of one as the metrics read."""

    bytes_on_disk = 1234
    storage_ratio = 0.2


def test_every_verdict_and_drop_is_told(tmp_path):
    """A task that was not measured is not a number, and its gates did not pass."""
    report = judge(
        GateRules(),
        bundle_id="f" * 64,
        storage_ratio=0.2,
        own={"a": measured("a", 0.8), "b": None},
        merged={"a": measured("a", 0.6), "b": measured("b", 0.9)},
    )
    write_candidate(tmp_path, "demo", Manifest(), report)
    write_merge(tmp_path, "demo", 2.5)
    found, of = read(tmp_path), ("bundle", "demo")
    assert found["hydraopt_candidate_bytes", of] == 1234
    assert found["hydraopt_candidate_storage_ratio", of] == 0.2
    assert found["hydraopt_merge_seconds", of] == 2.5
    assert found["hydraopt_gates_passed", of] == 0
    assert found["hydraopt_task_drop_percent", of, ("task", "a")] == pytest.approx(25)
    assert math.isnan(found["hydraopt_task_drop_percent", of, ("task", "b")])
    gates = {
        (dict(labels)["gate"], dict(labels)["task"]): value
        for (name, *labels), value in found.items()
        if name == "hydraopt_gate_passed"
    }
    assert gates == {
        ("max_storage_ratio", ""): 1,
        ("tasks", ""): 1,
        ("min_samples", "a"): 1,
        ("max_task_drop_percent", "a"): 0,
        ("min_samples", "b"): 0,
        ("max_task_drop_percent", "b"): 0,
        ("max_mean_drop_percent", ""): 0,
    }


def test_every_metric_says_what_it_is_and_nothing_half_written_is_left(tmp_path):
    note_behind(tmp_path, "b", behind=True)
    note_reconcile(tmp_path, seconds=1, bundles=["b"])
    write_merge(tmp_path, "b", 1)
    for path in (tmp_path / "metrics").glob("*.prom"):
        text = path.read_text()
        names = set(re.findall(r"^(hydraopt_\w+)", text, re.MULTILINE))
        assert names == set(re.findall(r"^# HELP (\w+) \S", text, re.MULTILINE))
    assert {path.suffix for path in (tmp_path / "metrics").iterdir()} <= {".prom", ".lock"}
