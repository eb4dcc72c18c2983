"""The rules a candidate bundle must pass, and the verdict on it: a pure function of what was measured.

What is missing, not a number, or was measured on other rows never passes and is never skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.result import Evaluation
from hydraopt.evaluation.yaml_file import explain, read_yaml
from hydraopt.strict_settings import StrictSettings

# 100 * (0.8 - 0.76) / 0.8 is 5.000000000000004: a limit met exactly must not fail by rounding.
_ROUNDING = 1e-9


class TaskRules(StrictSettings):
    """Other limits for one task."""

    max_drop_percent: float | None = Field(
        None, allow_inf_nan=False, description="Instead of max_task_drop_percent."
    )
    min_samples: int | None = Field(None, ge=1, description="Instead of the common min_samples.")


class GateRules(StrictSettings):
    """What a bundle must keep to. A drop is relative: 5 means that 95 % of the own adapter's score is left."""

    max_storage_ratio: float = Field(
        0.25, gt=0, allow_inf_nan=False, description="Bundle bytes over input bytes."
    )
    max_task_drop_percent: float = Field(
        5.0, allow_inf_nan=False, description="Largest drop of any one task."
    )
    max_mean_drop_percent: float = Field(
        1.0, allow_inf_nan=False, description="Largest mean drop over the tasks."
    )
    min_samples: int = Field(50, ge=1, description="Fewest rows a task must be measured on.")
    tasks: dict[str, TaskRules] = Field(default_factory=dict, description="Other limits for single tasks.")

    @classmethod
    def load(cls, path: str | Path) -> GateRules:
        """Read rules from a YAML file.

        Raises:
            TaskFileError: If it cannot be read, or holds an unknown key or an impossible limit.
        """
        try:
            return cls.model_validate(read_yaml(Path(path)))
        except ValidationError as reason:
            raise TaskFileError(f"{path}: {explain(reason)}") from reason


class Verdict(StrictSettings):
    """One rule applied to one subject."""

    rule: str = Field(description="Name of the rule.")
    subject: str = Field(description="The bundle, or the task judged.")
    value: float | None = Field(description="What was measured; None if it could not be.")
    limit: float = Field(description="What the rule allows.")
    passed: bool
    reason: str = Field(description="Why, in one sentence.")


class TaskComparison(StrictSettings):
    """A task's own adapter against the bundle."""

    own: float | None = Field(description="Score of its own adapter; None if missing or not a number.")
    merged: float | None = Field(description="Score with the bundle; None if missing or not a number.")
    drop_percent: float | None = Field(description="100 (own - merged) / own; None if it cannot be told.")
    samples: int | None = Field(description="Rows both were measured on; None if they differ.")
    metric: str | None = Field(description="The metric of both; None if they differ.")


class GateReport(StrictSettings):
    """The verdict on one bundle. Equal inputs give equal reports, down to the bytes."""

    bundle_id: str = Field(description="The bundle judged.")
    passed: bool = Field(description="Whether every verdict passed.")
    storage_ratio: float | None = Field(description="Bundle bytes over input bytes; None if not a number.")
    mean_drop_percent: float | None = Field(description="Mean over all tasks; None if one is unknown.")
    tasks: dict[str, TaskComparison] = Field(description="By task name.")
    verdicts: tuple[Verdict, ...] = Field(description="Every rule applied, in a fixed order.")
    rules: GateRules = Field(description="The rules judged by.")

    def canonical(self) -> bytes:
        """The report as JSON with sorted keys and no spaces."""
        value = self.model_dump(mode="json")
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of :meth:`canonical`."""
        return hashlib.sha256(self.canonical()).hexdigest()


def judge(
    rules: GateRules,
    *,
    bundle_id: str,
    storage_ratio: float,
    own: Mapping[str, Evaluation | None],
    merged: Mapping[str, Evaluation | None],
) -> GateReport:
    """Apply the rules to what was measured.

    Args:
        rules: What the bundle must keep to.
        bundle_id: Names the bundle in the report.
        storage_ratio: Bundle bytes over input bytes.
        own: What each task's own adapter scored; None where it could not be measured.
        merged: What the bundle scored on the same rows.
    """
    names = sorted({*own, *merged})
    verdicts = [_judge_storage(rules, bundle_id, storage_ratio), _judge_set(rules, bundle_id, names)]
    tasks = {}
    for name in names:
        comparison, faults = _compare(own.get(name), merged.get(name))
        tasks[name] = comparison
        verdicts += _judge_task(rules, name, comparison, faults)
    mean = _mean([comparison.drop_percent for comparison in tasks.values()])
    verdicts.append(_judge_mean(rules, bundle_id, mean))
    return GateReport(
        bundle_id=bundle_id,
        passed=all(verdict.passed for verdict in verdicts),
        storage_ratio=_finite(storage_ratio),
        mean_drop_percent=mean,
        tasks=tasks,
        verdicts=tuple(verdicts),
        rules=rules,
    )


def _judge_storage(rules: GateRules, bundle_id: str, storage_ratio: float) -> Verdict:
    value = _finite(storage_ratio)
    passed = value is not None and 0 < value <= rules.max_storage_ratio + _ROUNDING
    reason = (
        f"the storage ratio is {storage_ratio}, which is no ratio"
        if value is None or value <= 0
        else f"{value:.4f} of the input bytes, at most {rules.max_storage_ratio:.4f} allowed"
    )
    return Verdict(
        rule="max_storage_ratio",
        subject=bundle_id,
        value=value,
        limit=rules.max_storage_ratio,
        passed=passed,
        reason=reason,
    )


def _judge_set(rules: GateRules, bundle_id: str, names: list[str]) -> Verdict:
    """A bundle of no tasks passes nothing; a rule for a task that is not there is a misspelt one."""
    strangers = sorted(rules.tasks.keys() - set(names))
    reason = f"{len(names)} tasks measured"
    if strangers:
        reason = (
            f"rules name tasks that are not in the bundle: {', '.join(strangers)}; correct or remove them"
        )
    elif not names:
        reason = "no task was measured"
    return Verdict(
        rule="tasks",
        subject=bundle_id,
        value=len(names),
        limit=1,
        passed=bool(names) and not strangers,
        reason=reason,
    )


def _compare(own: Evaluation | None, merged: Evaluation | None) -> tuple[TaskComparison, str]:
    """The comparison, and why it cannot be trusted ("" if it can)."""
    a, b = _score(own), _score(merged)
    samples = own.samples if own and merged and own.samples == merged.samples else None
    metric = own.metric if own and merged and own.metric == merged.metric else None
    fault = _fault(own, merged, a, b)
    drop = None if fault or a is None or b is None else _drop_percent(a, b)
    return TaskComparison(own=a, merged=b, drop_percent=drop, samples=samples, metric=metric), fault


def _fault(own: Evaluation | None, merged: Evaluation | None, a: float | None, b: float | None) -> str:
    if own is None or merged is None:
        return f"no measurement of {'its own adapter' if own is None else 'the bundle'}"
    if a is None or b is None:
        which, evaluation = ("its own adapter", own) if a is None else ("the bundle", merged)
        return f"the score of {which} is {evaluation.value}, which is no score"
    for what in ("task", "metric", "samples", "data_digest", "rules"):
        left, right = getattr(own, what), getattr(merged, what)
        if left != right:
            return f"not comparable: {what} is {left} for its own adapter, {right} for the bundle"
    return ""


def _drop_percent(own: float, merged: float) -> float:
    """What share of the score is lost. Where there was nothing to lose, nothing is."""
    return 0.0 if own <= _ROUNDING else 100 * (own - merged) / own


def _judge_task(rules: GateRules, name: str, comparison: TaskComparison, fault: str) -> list[Verdict]:
    special = rules.tasks.get(name, TaskRules())
    fewest = rules.min_samples if special.min_samples is None else special.min_samples
    limit = rules.max_task_drop_percent if special.max_drop_percent is None else special.max_drop_percent
    samples, drop = comparison.samples, comparison.drop_percent
    enough = samples is not None and samples >= fewest
    kept = drop is not None and drop <= limit + _ROUNDING
    return [
        Verdict(
            rule="min_samples",
            subject=name,
            value=samples,
            limit=fewest,
            passed=enough,
            reason=fault if samples is None else f"measured on {samples} rows, at least {fewest} needed",
        ),
        Verdict(
            rule="max_task_drop_percent",
            subject=name,
            value=drop,
            limit=limit,
            passed=kept,
            reason=fault
            or f"{comparison.metric} {comparison.own:.4f} alone, {comparison.merged:.4f} merged: "
            f"{drop:.2f} % lost, at most {limit:.2f} % allowed",
        ),
    ]


def _judge_mean(rules: GateRules, bundle_id: str, mean: float | None) -> Verdict:
    limit = rules.max_mean_drop_percent
    return Verdict(
        rule="max_mean_drop_percent",
        subject=bundle_id,
        value=mean,
        limit=limit,
        passed=mean is not None and mean <= limit + _ROUNDING,
        reason="the drop of a task is unknown, so the mean is too"
        if mean is None
        else f"{mean:.2f} % lost on average, at most {limit:.2f} % allowed",
    )


def _mean(drops: list[float | None]) -> float | None:
    known = [drop for drop in drops if drop is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(drops) else None


def _score(evaluation: Evaluation | None) -> float | None:
    """The score if it is one: in [0, 1], where every metric lies. NaN is in no interval."""
    return evaluation.value if evaluation is not None and 0 <= evaluation.value <= 1 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
