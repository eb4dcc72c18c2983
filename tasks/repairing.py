"""Bring back what MLflow and Prefect show, from the object store."""

from __future__ import annotations

from functools import partial

from infra.approvers import approvers_of
from infra.candidates import CandidateStatus, list_candidates
from infra.channels import channels_of, live
from infra.evidence import read_gate_report
from infra.publishing import Published
from infra.settings import Settings
from infra.view_repair import repair_adapters, repair_bundles
from tasks.artifacts import show_gates, show_move
from tasks.store import object_store
from tasks.verb import progress, verb


@verb(task_run_name="show every adapter in MLflow again")
def show_adapters_again(settings: Settings) -> tuple[int, int]:
    """Versions shown, and serving aliases brought back."""
    return repair_adapters(object_store(settings), settings, progress)


@verb(task_run_name="show every bundle in MLflow again")
def show_bundles_again(settings: Settings) -> tuple[int, dict[str, dict[str, int]]]:
    """Bundles shown, and the live version by bundle name and channel."""
    return repair_bundles(object_store(settings), settings, progress)


@verb(task_run_name="show gates and channels in Prefect again")
def show_artifacts_again(settings: Settings) -> int:
    """The newest gate report of every bundle name and what its channels show; returns how many reports."""
    store = object_store(settings)
    newest: dict[str, CandidateStatus] = {}
    for one in list_candidates(store, None, partial(approvers_of, settings.home)):
        newest.setdefault(one.name, one)
    for name, status in newest.items():
        report = read_gate_report(store, name, status.bundle_id)
        if report is not None:
            show_gates(name, report)
        for channel in channels_of(store, name):
            move = live(store, name, channel)
            if move is not None:
                show_move(
                    Published(
                        name=name,
                        channel=channel,
                        version=move.version,
                        bundle_id=move.bundle_id,
                        moved=False,
                        live_version=move.version,
                        live_bundle_id=move.bundle_id,
                        sequence=move.sequence,
                    )
                )
    return len(newest)
