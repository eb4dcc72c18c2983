"""Forks publishers for every line read, which die as the line says; answers each with what became of them.

Usage: python publishing_child.py NAME KEYFILE BUNDLE...
Lines on one publisher, of all bundles one after the other:
    ``sent 7``     dies when the store has answered its 7th request, which it never hears
    ``unsent 7``   dies before it sends its 7th request
    ``after 0.3``  is killed after 0.3 s, wherever it is then
    ``never 0``    goes on to its end
    ``count 0``    the same; the answer holds the number of its requests
Lines on many, each a process of its own with one of the bundles, all let go at the same moment:
    ``race 32``    nobody dies
    ``war 32 5``   half of them die at requests drawn with seed 5
A file in the place of a bundle's folder is stored as a blob.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hydraopt.bundle import Bundle
from hydraopt.evaluation.gates import GateRules
from hydraopt.evaluation.result import Evaluation
from infra.approvals import approve
from infra.approvers import Approvers
from infra.bundle_store import upload_bundle
from infra.evidence import write_evidence, write_gate_report
from infra.object_store import ObjectStore
from infra.publishing import publish
from infra.settings import Settings
from infra.signatures import load_private_key
from infra.supply_chain.describe import describe_bundle
from infra.supply_chain.service_key import service_key


def release(store: ObjectStore, name: str, key_file: Path, folder: Path) -> None:
    """Everything from a merged bundle to a live one."""
    key, service = load_private_key(key_file), service_key(Settings.load().home)
    trusted = Approvers({"alice": key.public_key()}, {"pipeline": service.public_key()})
    bundle_id = upload_bundle(store, name, folder)
    measured = {
        task: Evaluation(
            task=task,
            metric="accuracy",
            value=0.8,
            low=0.7,
            high=0.9,
            samples=100,
            metrics={},
            data_digest="0" * 64,
        )
        for task in Bundle.load(folder).task_names
    }
    describe_bundle(store, name, bundle_id, fingerprint="f" * 64, key=service)
    write_evidence(store, name, bundle_id, own=measured, merged=measured)
    write_gate_report(store, name, bundle_id, GateRules(max_storage_ratio=1))
    approve(store, name, bundle_id, "alice", key, trusted)
    publish(store, name, bundle_id, "stable", trusted)


def on_request(store: ObjectStore, event: str, act: Callable[[int], None]) -> None:
    """Call ``act`` with the number of every request, before it is ``sent`` on or when it was answered."""
    counter = itertools.count(1)
    store._client.meta.events.register(
        {"sent": "after-call.s3", "unsent": "before-send.s3"}[event], lambda **_details: act(next(counter))
    )


def die_at(store: ObjectStore, event: str, request: int) -> None:
    """Let this process be killed by its ``request``-th request."""

    def strike(number: int) -> None:
        if number == request:
            os.kill(os.getpid(), signal.SIGKILL)

    on_request(store, event, strike)


def fork(work: Callable[[], None]) -> int:
    """A process that does ``work`` and ends with status 0, or with 1 and a traceback."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - a fork must never go on in its parent's code
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    return process


def fate(process: int) -> str:
    """What became of a process, once it has ended."""
    status = os.waitpid(process, 0)[1]
    return "killed" if os.WIFSIGNALED(status) else "done" if status == 0 else "failed"


class Publishers:
    """One bundle name, the key that signs, and the bundles to publish."""

    def __init__(self, name: str, key_file: Path, folders: list[Path]) -> None:
        self.name, self.key_file, self.folders = name, key_file, folders
        # Made before the forks, so that each one need not read the client's description of S3 again.
        self.store = ObjectStore(Settings.load())
        service_key(Settings.load().home)

    def work(self, folders: list[Path]) -> None:
        for folder in folders:
            if folder.is_file():
                self.store.put_blob(folder)
            else:
                release(self.store, self.name, self.key_file, folder)

    def one(self, event: str, when: str) -> str:
        """One publisher of everything."""
        reading, writing = os.pipe()

        def publish_all() -> None:
            if event in {"sent", "unsent"}:
                die_at(self.store, event, int(when))
            if event == "count":
                on_request(self.store, "sent", lambda _: os.write(writing, b"."))
            self.work(self.folders)

        process = fork(publish_all)
        os.close(writing)
        if event == "after":
            time.sleep(float(when))
            os.kill(process, signal.SIGKILL)
        outcome = fate(process)
        with os.fdopen(reading, "rb") as requests:
            return f"{outcome} {len(requests.read())}" if event == "count" else outcome

    def many(self, count: int, chance: random.Random | None) -> str:
        """Many at once; with ``chance`` every second one dies on the way."""
        gate, opener = os.pipe()
        processes = []
        for number in range(count):
            death = (chance.choice(["sent", "unsent"]), chance.randint(1, 80)) if chance else None
            folder = self.folders[number % len(self.folders)]

            def publish_one(
                folder: Path = folder, death: tuple[str, int] | None = death, n: int = number
            ) -> None:
                os.close(opener)
                if death is not None and n % 2:
                    die_at(self.store, *death)
                os.read(gate, 1)  # until nobody can write any more
                self.work([folder])

            processes.append(fork(publish_one))
        os.close(opener)
        outcomes = [fate(process) for process in processes]
        os.close(gate)
        return " ".join(str(outcomes.count(one)) for one in ("done", "killed", "failed"))


def main() -> None:
    publishers = Publishers(sys.argv[1], Path(sys.argv[2]), [Path(one) for one in sys.argv[3:]])
    print("ready", flush=True)
    for line in sys.stdin:
        event, *values = line.split()
        if event == "race":
            print(publishers.many(int(values[0]), None), flush=True)
        elif event == "war":
            print(publishers.many(int(values[0]), random.Random(int(values[1]))), flush=True)
        else:
            print(publishers.one(event, values[0]), flush=True)


if __name__ == "__main__":
    main()
