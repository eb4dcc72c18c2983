"""What the pipeline adds: publishing beside a plain upload, the update of a device, a registration's way, recoveries.

    python tests/benchmarks/bench_pipeline.py
    python tests/benchmarks/bench_pipeline.py --folder ADAPTERS    # keep the made adapters (0.9 GB) for the next time

Starts the local services below a temporary home, measures, and prints a table. Everything on loopback. Figures that
are compared are measured in turn against the same server, and the best of three counts for either side.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import psutil
from model_shapes import write_adapters
from rich.console import Console
from rich.table import Table

import hydraopt
from hydraopt.evaluation.gates import GateRules
from hydraopt.evaluation.result import Evaluation
from infra import local_services
from infra.approvals import approve
from infra.approvers import Approvers
from infra.bundle_store import upload_bundle
from infra.candidates import list_candidates
from infra.device_pull import pull
from infra.evidence import write_evidence, write_gate_report
from infra.object_store import ObjectStore
from infra.publishing import publish
from infra.settings import Settings
from infra.signatures import generate_key, load_private_key
from infra.supply_chain.describe import describe_bundle
from infra.supply_chain.service_key import service_key

TASKS = 40
BUDGET = 0.11  # about 100 MB of the adapters' 0.9 GB
NAME = "bench"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="Where the adapters are kept; default: made and removed.")
    arguments = parser.parse_args()
    console = Console(width=130)
    with tempfile.TemporaryDirectory(prefix="hydraopt-bench-") as temporary:
        work = Path(temporary)
        console.print("merging 40 adapters, and again onto the kept shared part after one changed ...")
        bundles = _bundles(arguments.folder or work / "adapters", work)
        table = Table("what", "measured", "asked", title=f"load average before: {os.getloadavg()[0]:.2f}")
        with _services(work / "home", console) as home:
            for row in (*_publishing(home, bundles, work), *_ways(home, work), *_recoveries(home)):
                table.add_row(*row)
                console.print(" | ".join(row))
        console.print(table)


def _bundles(adapters: Path, work: Path) -> list[Path]:
    """The bundle of 40 tasks, and the same onto its shared part after one task changed."""
    *folders, changed = write_adapters("llama-3.2-1b", TASKS + 1, 16, adapters)
    named: dict[str, Path] = {folder.name: folder for folder in folders}
    first = hydraopt.merge(named, budget=BUDGET).save(work / "first")
    update = {**named, folders[0].name: changed}
    return [first, hydraopt.merge(update, keep_shared=first).save(work / "second")]


@contextmanager
def _services(home: Path, console: Console) -> Iterator[Path]:
    clean = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("HYDRAOPT_")}
    os.environ["HYDRAOPT_HOME"] = str(home)
    try:
        console.print("starting the services ...")
        local_services.up(home)
        yield home
    finally:
        local_services.down(home)
        os.environ.update(clean)


def _publishing(home: Path, bundles: list[Path], work: Path) -> Iterator[tuple[str, str, str]]:
    """Publish each bundle; an upload of the same files by boto3 alone before and after."""
    settings = Settings.load(home)
    store = ObjectStore(settings)
    generate_key(work / "key.pem")
    key, service = load_private_key(work / "key.pem"), service_key(home)
    trusted = Approvers({"ana": key.public_key()}, {"pipeline": service.public_key()})

    tasks = {task: _measured(task) for task in hydraopt.verify(bundles[0]).task_names}

    def release(folder: Path) -> None:
        bundle_id = upload_bundle(store, NAME, folder)
        describe_bundle(store, NAME, bundle_id, fingerprint="f" * 64, key=service)
        write_evidence(store, NAME, bundle_id, own=tasks, merged=tasks)
        write_gate_report(store, NAME, bundle_id, GateRules(max_storage_ratio=1))
        approve(store, NAME, bundle_id, "ana", key, trusted)
        publish(store, NAME, bundle_id, "stable", trusted)

    plain = min(_seconds(lambda: _plain_upload(settings, bundles[0])) for _ in range(3))
    ours = _seconds(lambda: release(bundles[0]))  # only a first time sends the files
    size = sum(file.stat().st_size for file in bundles[0].rglob("*") if file.is_file())
    yield (
        f"upload, description, approval and publication of {size / 1e6:.0f} MB, beside a plain boto3 upload",
        f"{ours:.2f} s / {plain:.2f} s = {ours / plain:.2f}",
        "<= 3",
    )
    pull(store, NAME, "stable", work / "device", trusted)
    release(bundles[1])
    update = pull(store, NAME, "stable", work / "device", trusted)
    yield (
        f"pull after one of {TASKS} tasks changed: share of the bundle's bytes",
        f"{100 * update.fetched_bytes / size:.2f} % in {update.fetched_files} files",
        "<= 5 %",
    )


def _plain_upload(settings: Settings, folder: Path) -> None:
    """The files as they are, by boto3's own transfer manager, under names that are new each time."""
    client = boto3.client(
        "s3", endpoint_url=settings.s3_endpoint, aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=settings.s3_secret_key.get_secret_value(), region_name="us-east-1",
    )  # fmt: skip
    prefix = f"plain/{secrets.token_hex(8)}"
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(file), settings.s3_bucket, f"{prefix}/{file.name}")


def _ways(home: Path, work: Path) -> Iterator[tuple[str, str, str]]:
    """From a registration to its candidate, by the event it sends; the merge of so small a set takes no time."""
    store = ObjectStore(Settings.load(home))
    small = write_adapters("llama-3.2-1b-four", 2, 4, work / "small")
    _command("ingest", str(small[0]), "--task", "one")
    started = time.monotonic()
    _command("ingest", str(small[1]), "--task", "two")
    registered = time.monotonic()
    deadline = registered + 600
    while not any(set(one.tasks) == {"one", "two"} for one in list_candidates(store, None)):
        if time.monotonic() > deadline:
            yield "registration to candidate, by an event", "none within 10 minutes", "<= 30 s"
            return
        time.sleep(0.5)
    waited = time.monotonic() - registered
    yield (
        "registration to candidate, by an event, compute included",
        f"{waited:.0f} s (and {registered - started:.0f} s for the command that registers)",
        "<= 30 s",
    )
    direct = _seconds(lambda: _command("reconcile"))
    yield (
        "the same with every event lost, at worst: 300 s of schedule, and a reconcile",
        f"{300 + direct + waited:.0f} s at most",
        "<= 330 s",
    )


def _recoveries(home: Path) -> Iterator[tuple[str, str, str]]:
    """SIGKILL a service; until everything is healthy again and a reconcile has gone through."""
    for service in [state.name for state in local_services.status(home).services if state.pid]:
        pid = next(state.pid for state in local_services.status(home).services if state.name == service)
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            os.kill(process.pid, signal.SIGKILL)

        def recover() -> None:
            _command("up")
            _command("reconcile")

        yield f"recovery after SIGKILL of {service}", f"{_seconds(recover):.0f} s", "<= 120 s"


def _command(*words: str) -> None:
    program = shutil.which("hydraopt", path=str(Path(sys.executable).parent)) or "hydraopt"
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"hydraopt {' '.join(words)}: exit {done.returncode}: {done.stderr[-2000:]}")


def _measured(task: str) -> Evaluation:
    """Evidence of made adapters, which answer nothing: only the way it takes is measured here."""
    return Evaluation(
        task=task, metric="accuracy", value=0.8, low=0.7, high=0.9, samples=100, metrics={}, data_digest="0" * 64
    )  # fmt: skip


def _seconds(work: Callable[[], None]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
