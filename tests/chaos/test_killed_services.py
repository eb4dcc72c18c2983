"""Servers, workers and a merge are killed while a change goes through; `hydraopt up` and one reconcile mend it.

A change: an adapter is ingested, the set merged, the candidate signed and released. Whatever a command
acknowledged with exit code 0 must be there afterwards, and what failed must have said so plainly.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_tasks
from invariants import check_store, versions
from pipeline_home import Pipeline, Result, production_pipeline
from service_kills import VICTIMS, Striker, draw

from infra import local_services
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import fetch_adapter, load_adapter_version
from infra.approvers import approvers_of
from infra.candidates import list_candidates
from infra.object_store import ObjectStore
from infra.settings import Settings

pytest.importorskip("prefect")
pytestmark = pytest.mark.integration

TASKS = ("topic", "first")
LONGEST_COMMAND_S = 400


@dataclass
class Office:
    """A running pipeline with a live version, and what its commands take undisturbed."""

    pipeline: Pipeline
    trained: dict[str, Path]
    key: Path
    changes: itertools.count = field(default_factory=lambda: itertools.count(1))
    lasts: dict[str, float] = field(default_factory=dict)
    measured: list[str] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.pipeline.home

    def store(self) -> ObjectStore:
        return ObjectStore(Settings.load(self.home))

    def next_adapter(self) -> Path:
        """The task's adapter a little changed: another digest, the same answers."""
        number = next(self.changes)
        folder = self.pipeline.folder / f"topic-{number}"
        shutil.copytree(self.trained["topic"], folder)
        file = folder / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(file)
        scaled = {name: tensor * (1 + 1e-3 * number * ("lora_B" in name)) for name, tensor in tensors.items()}
        safetensors.torch.save_file(scaled, file)
        return folder


class Change:
    """One adapter on its way to the devices, by commands in a process of their own."""

    def __init__(self, office: Office, adapter: Path) -> None:
        self.office, self.adapter = office, adapter
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: tuple[str, Result] | None = None
        self.seconds: dict[str, float] = {}

    def run(self, enters=lambda step: None) -> None:
        """Step by step, as far as that goes."""
        office = self.office
        child = office.pipeline.start()
        watchdog = threading.Timer(3 * LONGEST_COMMAND_S, child.kill)
        watchdog.start()
        try:
            for step in ("ingest", "reconcile", "approve"):
                command = self._command(step)
                enters(step)
                started = time.monotonic()
                result = office.pipeline.ask(child, [*command, "--json"])
                self.seconds[step] = time.monotonic() - started
                if result.code != 0:
                    self.failed = step, result
                    return
                self.done[step] = result.json
                if step == "reconcile" and "bundle_id" not in self.bundle:
                    return  # another set is being merged meanwhile: not this one's turn
        finally:
            watchdog.cancel()
            child.stdin.close()
            child.wait(60)

    @property
    def bundle(self) -> dict[str, Any]:
        return self.done["reconcile"]["bundles"]["tiny"]

    def _command(self, step: str) -> list[object]:
        office = self.office
        if step == "ingest":
            return ["ingest", self.adapter, "--task", "topic", "--task-file", office.pipeline.task("topic")]
        if step == "reconcile":
            return ["reconcile"]
        return ["approve", self.bundle["bundle_id"], "--as", "ana", "--key", office.key]


@pytest.fixture(scope="module")
def office():
    """Version 1 is live; what its steps took is how long they take."""
    from hydraopt.evaluation.task_file import TaskFile
    from hydraopt.training.finetune import finetune

    with production_pipeline() as pipeline:
        tiny_tasks.write_bundle_file(pipeline.home, pipeline.encoder, list(TASKS))
        trained = {}
        for task in TASKS:
            trained[task] = pipeline.folder / task
            finetune(
                TaskFile.load(pipeline.task(task)), trained[task], work=pipeline.folder / "work", device="cpu"
            )
        made = Office(pipeline, trained, pipeline.folder / "ana.pem")
        pipeline.good(
            ["keygen", "ana", "--key", made.key],
            ["ingest", trained["first"], "--task", "first", "--task-file", pipeline.task("first")],
        )
        pipeline.stop()
        first = Change(made, made.next_adapter())
        first.run()
        assert first.failed is None, first.failed
        assert first.done["approve"]["released"]["live_version"] == 1
        made.lasts = first.seconds
        yield made
    print("\n" + "\n".join(made.measured))


def cases(*, everything: bool, chance) -> list[tuple[str, ...]]:
    """Everyone alone and in pairs; or one pair, since each case takes most of a minute."""
    pairs = list(itertools.combinations(VICTIMS, 2))
    if everything:
        return [(one,) for one in VICTIMS] + pairs
    return [chance.choice(pairs)]


def test_killed_while_a_change_goes_through(office, chance, long_form):
    for victims in cases(everything=long_form, chance=chance):
        strike = draw(victims, office.lasts, chance)
        print(f"\n{strike}", flush=True)
        before = check_store(office.store(), "tiny", approvers_of(office.home, "tiny"))
        change = Change(office, office.next_adapter())
        striker = Striker(office.home, strike)

        def go(change=change, striker=striker) -> None:
            try:
                change.run(striker.enters)
            finally:
                striker.change_is_over()

        going = threading.Thread(target=go)
        going.start()
        striker.wait()
        recovered = recover(office)
        going.join()
        office.measured.append(f"{strike}: {recovered}")
        print(f"{recovered}; acknowledged {sorted(change.done)}, failed {change.failed}", flush=True)

        check_failure(change)
        check_kept(office, change)
        finish(office, change, before.version)


def recover(office: Office) -> str:
    """`hydraopt up` and one reconcile, as a person would after a look at what is red."""
    started = time.monotonic()
    local_services.up(office.home)
    up = time.monotonic()
    result = office.pipeline.run_with({}, ["reconcile", "--json"])
    assert result.code == 0, result
    assert local_services.status(office.home).healthy
    return f"up after {up - started:.1f} s, reconciled after {time.monotonic() - started:.1f} s"


def check_failure(change: Change) -> None:
    """What failed said so: not our fault (1), by a server's name, with a way on."""
    if change.failed is None:
        return
    step, result = change.failed
    assert result.code == 2, (step, result.stderr[-4000:])
    assert result.json["kind"] == "ServiceError", (step, result.json)
    assert "hydraopt up" in result.json["error"] or "run it again" in result.json["error"], result.json


def check_kept(office: Office, change: Change) -> None:
    """The store is valid, what was acknowledged is there, and an approval that got there has led to its release."""
    settings, store = Settings.load(office.home), office.store()
    shown = check_store(store, "tiny", approvers_of(office.home, "tiny"))
    states = {one.bundle_id: one.state for one in list_candidates(store, "tiny")}
    assert "approved" not in states.values(), "approved, and not released by the reconcile"
    if "ingest" in change.done:
        base, digest = str(office.pipeline.encoder), change.done["ingest"]["digest"]
        version = load_adapter_version(store, base, "topic", digest)
        fetch_adapter(store, version, office.pipeline.folder / "fetched")
        assert AdapterRegistry(settings).serving()[base, "topic"] == digest
    if "reconcile" in change.done and "bundle_id" in change.bundle:
        assert states[change.bundle["bundle_id"]] in {"awaiting-approval", "published"}
    if "approve" in change.done:
        assert shown.bundle_id == change.bundle["bundle_id"]


def finish(office: Office, change: Change, before: int) -> None:
    """The same commands again: the change is live, under the next number and no other."""
    again = Change(office, change.adapter)
    again.run()
    assert again.failed is None, again.failed
    shown = check_store(office.store(), "tiny", approvers_of(office.home, "tiny"))
    assert shown.bundle_id == again.bundle["bundle_id"]
    assert shown.version == before + 1
    assert versions(office.store(), "tiny")[before + 1] == shown.bundle_id
