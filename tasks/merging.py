"""Merge an adapter set, and measure the result."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import hydraopt
from hydraopt import Bundle
from hydraopt.atomic_files import write_atomically
from hydraopt.bundle.layout import MANIFEST_FILE
from hydraopt.errors import AdapterMismatchError, BudgetError, BundleError
from hydraopt.evaluation.evaluate import evaluate_adapter, evaluate_bundle_tasks
from hydraopt.evaluation.result import Evaluation
from hydraopt.merging.frontier import frontier
from hydraopt.recipe import MADE_FROM
from hydraopt.report.charts import plot_frontier
from infra.adapter_store import AdapterVersion
from infra.blobs import BlobRef
from infra.bundle_store import read_manifest, read_manifest_bytes
from infra.channels import live
from infra.merge_workers import merge_workers
from infra.metrics import write_merge
from infra.object_store import ObjectStore
from infra.settings import Settings
from tasks.adapters import fetch_version
from tasks.desired import DesiredSet
from tasks.jobs import recorded_evaluation, recorded_job
from tasks.log_lines import say
from tasks.store import object_store
from tasks.verb import progress, verb


@verb(task_run_name="merge {desired.spec.name}")
def merge_adapters(settings: Settings, desired: DesiredSet, folders: dict[str, Path]) -> Path:
    """Merge under the recipe; the bundle's folder is named by the set's fingerprint."""
    out = settings.home / "work" / "merged" / str(desired.fingerprint)
    if _intact(out):
        return out
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    recipe = desired.spec.recipe.model_dump(exclude=MADE_FROM)
    bundle = _merged_onto_live(settings, desired, folders, recipe)
    if bundle is None:
        with merge_workers(settings) as executor:
            bundle = hydraopt.merge(folders, **recipe, progress=progress, executor=executor)
    bundle.save(out)
    write_merge(settings.home, desired.spec.name, time.monotonic() - started)
    return out


def _merged_onto_live(
    settings: Settings, desired: DesiredSet, folders: dict[str, Path], recipe: dict[str, Any]
) -> Bundle | None:
    """The set on the shared part of what is live. None, with the reason in the log, if it is to be merged afresh."""
    spec = desired.spec
    move = live(object_store(settings), spec.name, spec.channel) if spec.keep_shared else None
    if move is None:
        return None
    try:
        former = bundle_folder.fn(settings, spec.name, move.bundle_id, None)
        bundle = hydraopt.merge(folders, **recipe, keep_shared=former, progress=progress)
    except (AdapterMismatchError, BudgetError, BundleError) as reason:
        say("merged afresh, the shared part of version %s cannot be kept: %s", move.version, reason)
        return None
    if bundle.warnings:
        say("merged afresh instead of onto version %s: %s", move.version, "; ".join(bundle.warnings))
        return None
    say("the shared part of version %s is kept", move.version)
    return bundle


@verb(task_run_name="draw the frontier of {desired.spec.name}")
def draw_frontier(settings: Settings, desired: DesiredSet, folders: dict[str, Path]) -> Path | None:
    """A picture of error over storage for the set: whether another budget would pay. None: too small a set."""
    out = settings.home / "work" / "frontiers" / f"{desired.fingerprint}.png"
    if not out.exists():
        try:
            points = frontier(folders, dtype=desired.spec.recipe.dtype, progress=progress)
        except BudgetError:
            return None
        plot_frontier(points, out)
    return out


@verb(task_run_name="get bundle {bundle_id}")
def bundle_folder(settings: Settings, name: str, bundle_id: str, merged: Path | None) -> Path:
    """A local folder with exactly this bundle: what was just merged, a kept copy, or fetched."""
    if merged is not None and _intact(merged, bundle_id):
        return merged
    target = settings.home / "cache" / "bundles" / bundle_id
    if not _intact(target, bundle_id):
        _fetch_bundle(object_store(settings), name, bundle_id, target)
    return target


@verb(task_run_name="evaluate {version.task} alone")
def evaluate_alone(settings: Settings, version: AdapterVersion) -> Evaluation | None:
    """The task's own adapter on its test rows; as recorded if it was measured. None without rows."""
    job = recorded_job(settings, version)
    if job is None:
        return None
    known = recorded_evaluation(version, job)
    if known is not None:
        return known
    folder = fetch_version.fn(settings, version)
    return evaluate_adapter(job.task, folder, rows=job.rows, progress=progress)


@verb(task_run_name="evaluate bundle {desired.spec.name}")
def evaluate_merged(settings: Settings, desired: DesiredSet, folder: Path) -> dict[str, Evaluation]:
    """Every task that has test rows, with the bundle."""
    found = (recorded_job(settings, version) for version in desired.versions.values())
    jobs = [job for job in found if job is not None]
    rows = {job.task.name: job.rows for job in jobs}
    return evaluate_bundle_tasks([job.task for job in jobs], folder, rows=rows, progress=progress)


def _intact(folder: Path, bundle_id: str | None = None) -> bool:
    """Whether ``folder`` holds a whole bundle, and the one asked for."""
    try:
        return hydraopt.Bundle.load(folder).id == bundle_id if bundle_id else bool(hydraopt.verify(folder))
    except BundleError:
        return False


def _fetch_bundle(store: ObjectStore, name: str, bundle_id: str, target: Path) -> None:
    """Fetch every file, the manifest last; then verify."""
    shutil.rmtree(target, ignore_errors=True)
    for path, entry in read_manifest(store, name, bundle_id).files().items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        store.fetch_blob(BlobRef(sha256=entry.sha256, bytes=entry.bytes), target / path)
    write_atomically(target / MANIFEST_FILE, read_manifest_bytes(store, name, bundle_id))
    hydraopt.verify(target)
