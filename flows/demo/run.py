"""The demo's story, told with the very flows that the commands run.

Every station looks first for what is already there, so a killed demo goes on where it stopped, and a second
one finds nearly everything done. However often it runs, there is one version 1 and one version 2, and the
channel ends on version 1.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flows.command_line.output import Output
from infra import local_services
from infra.settings import Settings

if TYPE_CHECKING:
    from flows.demo.second_process import SecondProcess

_OURS = "services-of-the-demo"


def run_demo(output: Output, *, keep: bool) -> dict[str, Any]:
    """Run everything on the home of this process; stop the services it started unless ``keep``."""
    from flows.demo.material import task_files
    from flows.demo.second_process import SecondProcess

    started = time.monotonic()
    home = _prepare(Settings.load().home)
    pipeline, elsewhere = task_files()
    mine = len(pipeline) - max(0, (len(pipeline) - len(elsewhere)) // 2)
    with (
        SecondProcess.started(Settings.load(), elsewhere, pipeline[mine:]) as second,
        _services(output, home, keep=keep),
    ):
        from flows.connection import connect, running_flows

        settings = connect(verbose=output.verbose)
        second.servers_are_up()
        with running_flows(settings):
            result = _Story(output, settings, started).tell(pipeline[:mine], elsewhere, second)
        pages = {"prefect": str(settings.prefect_api_url).removesuffix("/api"), "mlflow": settings.mlflow_uri}
    output.show()
    for name, address in pages.items():
        output.show(
            f"{name:8} {address}" + ("" if keep else "   (stopped; `hydraopt demo --keep` leaves it running)")
        )
    seconds = round(time.monotonic() - started, 1)
    output.show(f"done in {seconds:.0f} s")
    return {**result, "pages": pages, "kept": keep, "seconds": seconds}


def _prepare(home: Path) -> Path:
    """The home folder with the demo's own; notes there whether the services are the demo's to stop."""
    running = any(one.running and not one.elsewhere for one in local_services.status(home).services)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (home / "demo").mkdir(exist_ok=True)
    if not running:
        (home / "demo" / _OURS).touch()
    return home


@contextlib.contextmanager
def _services(output: Output, home: Path, *, keep: bool) -> Iterator[None]:
    """Running services; those that ran before the first demo are not the demo's to stop."""
    mark = home / "demo" / _OURS
    output.note(f"Services below {home}")
    with output.progress() as progress:
        local_services.up(home, progress=progress)
    try:
        yield
    finally:
        if keep:
            mark.unlink(missing_ok=True)
        elif mark.exists():
            output.note("Stopping the services")
            local_services.down(home)
            mark.unlink(missing_ok=True)


class _Story:
    """The stations in order, and what is told of each."""

    def __init__(self, output: Output, settings: Settings, started: float) -> None:
        self.output = output
        self.settings = settings
        self._started = started

    def tell(self, pipeline: list[Path], elsewhere: list[Path], second: SecondProcess) -> dict[str, Any]:
        """All stations; returns what ``--json`` prints.

        Args:
            pipeline: Task files to fine-tune in this process.
            elsewhere: Those that the second process trains an adapter for with the library alone.
            second: It also fine-tunes the rest of the pipeline's tasks.
        """
        from flows.demo import material

        material.describe_bundle(self.settings)
        self._finetune_all(pipeline, second)
        for task_file in elsewhere:
            self._ingest(task_file)

        first = self._bring_up_to_date("Reconcile notices the new adapters")
        version_1 = self._release(first)
        self._pull(check=first)
        self._reconcile("Reconcile again: nothing changed")

        self._update(material.updated_task_file(self.settings, material.task_to_update()))
        updated = self._bring_up_to_date("Reconcile notices the one new adapter")
        version_2 = self._release(updated)
        self._pull(check=None)

        live = self._roll_back(version_1)
        self._pull(check=None)
        report = self._report(first)
        return {
            "bundle": material.BUNDLE,
            "versions": {str(version_1): first, str(version_2): updated},
            "live_version": live,
            "storage_ratio": report.storage_ratio,
            "mean_drop_percent": report.mean_drop_percent,
            "tasks": {task: one.model_dump(mode="json") for task, one in report.tasks.items()},
        }

    def _finetune_all(self, task_files: list[Path], second: SecondProcess) -> None:
        """Two trainings at a time, one here and one there."""
        import torch

        from flows.demo.second_process import threads
        from flows.finetune_task import finetune_task

        before = torch.get_num_threads()
        with self._station("Fine-tune adapters, two at a time") as progress, second.reporting(progress):
            torch.set_num_threads(threads())
            for task_file in task_files:
                self._say_trained(finetune_task(task_file))
            for result in second.results():
                self._say_trained(result)
            torch.set_num_threads(before)

    def _update(self, task_file: Path) -> None:
        from flows.finetune_task import finetune_task

        with self._station(f"Update one adapter: {task_file.stem}"):
            self._say_trained(finetune_task(task_file))

    def _say_trained(self, result: dict[str, Any]) -> None:
        how = "trained" if result["trained"] else "unchanged since an earlier training"
        self._say(f"{result['task']}: {result['metric']} {result['value']:.3f}, {how}")

    def _ingest(self, task_file: Path) -> None:
        from flows.demo.material import train_elsewhere
        from flows.ingest_adapter import ingest_adapter

        with self._station(f"Ingest an adapter trained elsewhere: {task_file.stem}") as progress:
            folder = train_elsewhere(self.settings, task_file, progress)
            result = ingest_adapter(str(folder), task_file.stem, task_file)
        how = "known already" if result["known"] else "registered"
        self._say(f"{result['task']}: {result['metric']} {result['value']:.3f}, {how}")

    def _bring_up_to_date(self, what: str) -> str:
        """Reconcile, show the candidate, return its id."""
        bundle = self._reconcile(what)
        self.output.show(self._table(bundle["bundle_id"]))
        return bundle["bundle_id"]

    def _reconcile(self, what: str) -> dict[str, Any]:
        from flows.demo.material import BUNDLE
        from flows.reconcile import reconcile

        with self._station(what):
            result = reconcile()
        bundle = result["bundles"][BUNDLE]
        verdict = "gates passed" if bundle["passed"] else "gates FAILED"
        self._say(
            f"{bundle['state']}: candidate {bundle['bundle_id'][:12]}, {verdict}, {result['seconds']:.1f} s"
        )
        return bundle

    def _release(self, bundle_id: str) -> int:
        """Sign and publish; returns the version."""
        from flows.demo.material import APPROVER, BUNDLE, CHANNEL, approver_key
        from flows.release import release
        from infra.approvers import approvers_of
        from infra.candidates import approve
        from infra.object_store import ObjectStore
        from infra.signatures import load_private_key

        with self._station(f"{APPROVER} approves, the release flow publishes"):
            key = load_private_key(approver_key(self.settings))
            store = ObjectStore(self.settings)
            approve(store, BUNDLE, bundle_id, APPROVER, key, approvers_of(self.settings.home, BUNDLE))
            result = release(BUNDLE, bundle_id, CHANNEL)
        how = "now" if result["moved"] else "in an earlier run"
        self._say(
            f"version {result['version']} was published {how}; version {result['live_version']} is live"
        )
        return result["version"]

    def _pull(self, check: str | None) -> None:
        """Do what a device does; ``check`` is the bundle whose measured score must be met again."""
        from flows.demo.material import BUNDLE, CHANNEL
        from infra.approvers import approvers_of
        from infra.device_pull import pull
        from infra.object_store import ObjectStore

        out = self.settings.home / "demo" / "device" / "bundle"
        with self._station("A device pulls") as progress:
            out.parent.mkdir(parents=True, exist_ok=True)
            pulled = pull(
                ObjectStore(self.settings),
                BUNDLE,
                CHANNEL,
                out,
                approvers_of(self.settings.home, BUNDLE),
                progress,
            )
        self._say(
            f"version {pulled.version}: fetched {pulled.fetched_files} files ({pulled.fetched_bytes:,} bytes), "
            f"kept {pulled.reused_files}"
        )
        if check is not None:
            self._predict(out, pulled.bundle_id)

    def _predict(self, folder: Path, bundle_id: str) -> None:
        """Ask the pulled bundle, and measure that it is as good as the candidate was."""
        from flows.demo.check import check_pulled

        with self._station("Ask the pulled bundle") as progress:
            answers = check_pulled(folder, self._report(bundle_id), progress)
        for answer in answers:
            self._say(answer)

    def _roll_back(self, to: int) -> int:
        from flows.demo.material import BUNDLE, CHANNEL
        from flows.rollback import rollback

        with self._station(f"Roll back to version {to}"):
            result = rollback(BUNDLE, CHANNEL, to)
        self._say(f"version {result['live_version']} is live")
        return result["live_version"]

    def _report(self, bundle_id: str) -> Any:
        from flows.demo.material import BUNDLE
        from infra.candidates import read_gate_report
        from infra.object_store import ObjectStore

        return read_gate_report(ObjectStore(self.settings), BUNDLE, bundle_id)

    def _table(self, bundle_id: str) -> Table:
        """Own adapter, bundle, drop and bytes of every task."""
        from flows.demo.material import BUNDLE
        from hydraopt.bundle.layout import SHARED_FILE, task_file
        from infra.candidates import read_manifest
        from infra.object_store import ObjectStore

        report = self._report(bundle_id)
        manifest = read_manifest(ObjectStore(self.settings), BUNDLE, bundle_id)
        files = manifest.files()
        table = Table("task", "metric", "own adapter", "bundle", "drop", "own bytes", "bundle bytes")
        for task, one in sorted(report.tasks.items()):
            table.add_row(
                task,
                one.metric or "-",
                _number(one.own),
                _number(one.merged),
                _percent(one.drop_percent),
                f"{manifest.tasks[task].bytes:,}",
                f"{files[task_file(task)].bytes:,}",
            )
        table.add_row("shared by all", "", "", "", "", "", f"{files[SHARED_FILE].bytes:,}", end_section=True)
        own = sum(entry.bytes for entry in manifest.tasks.values())
        table.add_row(
            "all",
            "mean drop",
            "",
            "",
            _percent(report.mean_drop_percent),
            f"{own:,}",
            f"{manifest.bytes_on_disk:,} ({manifest.storage_ratio:.3f})",
        )
        return table

    @contextlib.contextmanager
    def _station(self, title: str) -> Iterator[Any]:
        """A headline with the time since the start, then progress while it lasts."""
        from tasks.verb import reporting

        self.output.note(f"[{time.monotonic() - self._started:4.0f} s] {title}")
        with self.output.progress() as progress, reporting(progress):
            yield progress

    def _say(self, text: str) -> None:
        self.output.show(f"         {text}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f} %"
