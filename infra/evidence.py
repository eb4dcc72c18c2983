"""What was measured of a candidate, and what the gates said about it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hydraopt.errors import RecordError
from hydraopt.evaluation.gates import GateReport, GateRules, judge
from hydraopt.evaluation.result import Evaluation
from infra.bundle_store import read_manifest
from infra.object_store import ObjectStore
from infra.records import Record, append_record, latest_record, read_records


class Evidence(BaseModel):
    """Everything the gates look at. None: that could not be measured, and the gates say no."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    storage_ratio: float
    own: dict[str, Evaluation | None]
    merged: dict[str, Evaluation | None]


class Judgement(BaseModel):
    """A gate report, and the record of measurements that led to it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    evidence_sha256: str
    report: GateReport
    report_sha256: str


def write_evidence(
    store: ObjectStore,
    name: str,
    bundle_id: str,
    *,
    own: Mapping[str, Evaluation | None],
    merged: Mapping[str, Evaluation | None],
) -> Evidence:
    """Record how every task did with its own adapter and with the bundle; safe to repeat.

    Args:
        store: Where.
        name: Bundle name.
        bundle_id: Bundle id; its tasks are those that count, and one missing below counts as not measured.
        own: By task, its own adapter.
        merged: By task, the bundle.

    Raises:
        RecordError: If the bundle is not stored, or a task is named that it does not hold.
    """
    manifest = read_manifest(store, name, bundle_id)
    if strangers := (set(own) | set(merged)) - set(manifest.tasks):
        raise RecordError(
            f"bundle {bundle_id} holds no tasks {sorted(strangers)}: measured for another bundle?"
        )
    for task, evaluation in [*own.items(), *merged.items()]:
        if evaluation is not None and evaluation.task != task:
            raise RecordError(f"the measurement given for task {task!r} is of task {evaluation.task!r}")
    content = {
        "storage_ratio": manifest.storage_ratio,
        "own": {task: _dump(own.get(task)) for task in manifest.task_names},
        "merged": {task: _dump(merged.get(task)) for task in manifest.task_names},
    }
    record = append_record(
        store, name, bundle_id, "evaluated", content, unless_same=("storage_ratio", "own", "merged")
    )
    return _evidence(record)


def write_gate_report(store: ObjectStore, name: str, bundle_id: str, rules: GateRules) -> GateReport:
    """Judge the newest evidence of a candidate and record the verdict; safe to repeat.

    Another verdict is added when the rules, the evidence or the way of judging changed; the newest counts.

    Raises:
        RecordError: If nothing was measured yet, or a record is damaged.
    """
    record = latest_record(store, name, bundle_id, "evaluated")
    if record is None:
        raise RecordError(f"bundle {bundle_id} of {name!r} was not evaluated yet: run `hydraopt reconcile`")
    report = _judge(rules, bundle_id, _evidence(record))
    content = {
        "evidence_sha256": record.sha256,
        "report": report.model_dump(mode="json"),
        "report_sha256": report.digest,
    }
    added = append_record(
        store, name, bundle_id, "gated", content, unless_same=("evidence_sha256", "report_sha256")
    )
    return parse_judgement(added).report


def read_evidence(store: ObjectStore, name: str, bundle_id: str) -> Evidence | None:
    """The newest measurements of a candidate; None if there are none yet."""
    record = latest_record(store, name, bundle_id, "evaluated")
    return _evidence(record) if record else None


def read_gate_report(store: ObjectStore, name: str, bundle_id: str) -> GateReport | None:
    """The newest gate report as recorded, not judged again; None if there is none."""
    record = latest_record(store, name, bundle_id, "gated")
    return parse_judgement(record).report if record else None


def check_judgement(store: ObjectStore, name: str, bundle_id: str, record: Record) -> GateReport:
    """Judge again what a gate record judged, from the evidence it names; return the report as recorded.

    Wording may change between versions of hydraopt, and rules may be added; what was found may not.

    Raises:
        RecordError: If the evidence is gone or changed, or leads to other findings.
    """
    judgement = parse_judgement(record)
    evidence = find_record(store, name, bundle_id, "evaluated", judgement.evidence_sha256)
    if evidence is None:
        raise RecordError(
            f"the measurements behind the gate report of bundle {bundle_id} are gone or were changed: "
            "evaluate it again with `hydraopt reconcile`"
        )
    manifest = read_manifest(store, name, bundle_id)
    measured, said = _evidence(evidence), judgement.report
    again = _judge(said.rules, bundle_id, measured)
    holds = (
        set(measured.own) == set(measured.merged) == set(manifest.tasks)
        and measured.storage_ratio == manifest.storage_ratio
        and _report_sha256(record) == judgement.report_sha256
        and said.bundle_id == bundle_id
        and said.passed == again.passed
        and said.tasks == again.tasks
        and _findings(said) <= _findings(again)
    )
    if not holds:
        raise RecordError(
            f"the gate report of bundle {bundle_id} does not follow from its measurements: it was changed, or "
            "judged by another version of hydraopt. Judge it again with `hydraopt reconcile`"
        )
    return said


def _findings(report: GateReport) -> set[tuple[str, str, float | None, float, bool]]:
    return {(one.rule, one.subject, one.value, one.limit, one.passed) for one in report.verdicts}


def _report_sha256(record: Record) -> str:
    """The digest of a recorded report, from its JSON: a later version may read more fields into it."""
    report = record.content["report"]
    canonical = json.dumps(report, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def find_record(store: ObjectStore, name: str, bundle_id: str, state: Any, sha256: str) -> Record | None:
    """A bundle's record of a state with exactly these bytes, or None."""
    return next((one for one in read_records(store, name, bundle_id, state) if one.sha256 == sha256), None)


def parse_judgement(record: Record) -> Judgement:
    """A gate record's content.

    Raises:
        RecordError: If it is damaged.
    """
    try:
        return Judgement.model_validate(record.content)
    except ValidationError as error:
        raise RecordError(f"a gate record is damaged: {error.error_count()} fields cannot be read") from None


def _evidence(record: Record) -> Evidence:
    try:
        return Evidence.model_validate(record.content)
    except ValidationError as error:
        raise RecordError(
            f"an evaluation record is damaged: {error.error_count()} fields cannot be read"
        ) from None


def _judge(rules: GateRules, bundle_id: str, evidence: Evidence) -> GateReport:
    return judge(
        rules,
        bundle_id=bundle_id,
        storage_ratio=evidence.storage_ratio,
        own=evidence.own,
        merged=evidence.merged,
    )


def _dump(evaluation: Evaluation | None) -> dict[str, Any] | None:
    return None if evaluation is None else evaluation.model_dump(mode="json")
