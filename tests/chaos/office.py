"""A pipeline in the production profile with a live version, and changes on their way through it."""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny_tasks
from pipeline_home import Pipeline, Result, production_pipeline

from infra.object_store import ObjectStore
from infra.settings import Settings

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

    def run(self, enters: Callable[[str], None] = lambda _: None) -> None:
        """Step by step, as far as that goes; ``enters`` is told before each."""
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


@contextmanager
def open_office() -> Iterator[Office]:
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
