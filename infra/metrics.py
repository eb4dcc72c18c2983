"""Metrics for Prometheus, as text files: flows are short processes that nobody could scrape.

``<home>/metrics/*.prom`` is what the node exporter's textfile collector reads. Each file is replaced as a whole
and says what was true at the last run; how long ago that was is a metric, too.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile
from prometheus_client.parser import text_string_to_metric_families

from hydraopt.bundle.layout import Manifest
from hydraopt.evaluation.gates import GateReport

FOLDER = "metrics"
"""Where the files lie, below the home folder."""

_RECONCILE = "hydraopt_reconcile_"
_RUN, _SUCCESS, _SECONDS, _BEHIND, _LAG, _CATCH_UP = (
    _RECONCILE + name
    for name in (
        "last_run_timestamp_seconds",
        "last_success_timestamp_seconds",
        "seconds",
        "behind_since_timestamp_seconds",
        "lag_seconds",
        "catch_up_seconds",
    )
)
_HELP = {
    _RUN: "End of the last reconcile, however it went.",
    _SUCCESS: "End of the last reconcile that ended well.",
    _SECONDS: "Duration of the last reconcile.",
    _BEHIND: "When a reconcile first saw a set it had no judged candidate for; 0: up to date.",
    _LAG: "Since then, when this was written; 0: up to date.",
    _CATCH_UP: "What the last change took, from being seen to a judged candidate.",
}


def note_behind(home: Path, bundle: str, *, behind: bool) -> None:
    """Say whether a bundle's adapter set waits for its candidate; call it before and after a merge.

    How long it has waited is counted from the first call of many that say so.
    """
    now = time.time()
    with _reconcile_values(home) as values:
        since = values.get((_BEHIND, bundle), 0.0)
        if behind:
            values[_BEHIND, bundle] = since or now
            values[_LAG, bundle] = now - (since or now)
        else:
            values[_BEHIND, bundle] = values[_LAG, bundle] = 0.0
            if since:
                values[_CATCH_UP, bundle] = now - since


def note_reconcile(home: Path, *, seconds: float, bundles: Collection[str] | None) -> None:
    """Say how a reconcile went.

    Args:
        home: Home folder.
        seconds: How long it took.
        bundles: All bundles there are, once it ended well: others are no longer told of. None after a failure,
            which leaves the time of the last success what it was.
    """
    now = time.time()
    with _reconcile_values(home) as values:
        if bundles is not None:
            values[_SUCCESS, ""] = now
            for key in [key for key in values if key[1] and key[1] not in bundles]:
                del values[key]
        values[_RUN, ""], values[_SECONDS, ""] = now, seconds
        for name, bundle in list(values):
            if name == _BEHIND and values[name, bundle]:
                values[_LAG, bundle] = now - values[name, bundle]


def write_candidate(home: Path, bundle: str, manifest: Manifest, report: GateReport) -> Path:
    """Say how large the newest candidate of a bundle is and what the gates found."""
    path = _file(home, f"candidate-{bundle}")
    registry = CollectorRegistry()
    of = {"bundle": bundle}
    _set(registry, "hydraopt_candidate_bytes", "Bytes of the newest candidate.", manifest.bytes_on_disk, **of)
    _set(
        registry,
        "hydraopt_candidate_storage_ratio",
        "Its bytes over the adapters' bytes.",
        manifest.storage_ratio,
        **of,
    )
    _set(registry, "hydraopt_gates_passed", "1 if it passed every gate, else 0.", float(report.passed), **of)
    verdict = Gauge(
        "hydraopt_gate_passed", "1 if it passed this gate.", ["bundle", "gate", "task"], registry=registry
    )
    for one in report.verdicts:
        task = "" if one.subject == report.bundle_id else one.subject
        verdict.labels(bundle, one.rule, task).set(float(one.passed))
    drop = Gauge(
        "hydraopt_task_drop_percent",
        "Score lost against the task's own adapter; NaN: not measured.",
        ["bundle", "task"],
        registry=registry,
    )
    for task, found in sorted(report.tasks.items()):
        drop.labels(bundle, task).set(float("nan") if found.drop_percent is None else found.drop_percent)
    write_to_textfile(str(path), registry)
    return path


def write_merge(home: Path, bundle: str, seconds: float) -> Path:
    """Say how long the last merge of a bundle took, without measuring its tasks."""
    path = _file(home, f"merge-{bundle}")
    registry = CollectorRegistry()
    _set(registry, "hydraopt_merge_seconds", "Duration of the last merge.", seconds, bundle=bundle)
    write_to_textfile(str(path), registry)
    return path


def _file(home: Path, name: str) -> Path:
    folder = home / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.prom"


def _set(registry: CollectorRegistry, name: str, text: str, value: float, **labels: str) -> None:
    gauge = Gauge(name, text, list(labels), registry=registry)
    (gauge.labels(**labels) if labels else gauge).set(value)


@contextmanager
def _reconcile_values(home: Path) -> Iterator[dict[tuple[str, str], float]]:
    """The values of ``reconcile.prom`` by name and bundle, to be changed; written back when left."""
    path = _file(home, "reconcile")
    with FileLock(path.with_suffix(".lock")):
        values = _read(path)
        yield values
        registry = CollectorRegistry()
        for name, text in _HELP.items():
            here = {bundle: value for (what, bundle), value in sorted(values.items()) if what == name}
            if here:
                gauge = Gauge(name, text, [] if "" in here else ["bundle"], registry=registry)
                for bundle, value in here.items():
                    (gauge.labels(bundle) if bundle else gauge).set(value)
        write_to_textfile(str(path), registry)


def _read(path: Path) -> dict[tuple[str, str], float]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    return {
        (sample.name, sample.labels.get("bundle", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
