"""Forks a publisher for every line read, which dies at the request the line names; see test_publishing.py.

Usage: python publishing_child.py NAME KEYFILE BUNDLE...
A line is ``sent 7`` (die when the 7th request was answered), ``unsent 7`` (before it is sent), or ``never 0``.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
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


def release(store: ObjectStore, name: str, key_file: Path, folder: Path) -> None:
    """Everything from a merged bundle to a live one."""
    key = load_private_key(key_file)
    trusted = Approvers({"alice": key.public_key()})
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
    describe_bundle(store, name, bundle_id, fingerprint="f" * 64, key=key)
    write_evidence(store, name, bundle_id, own=measured, merged=measured)
    write_gate_report(store, name, bundle_id, GateRules(max_storage_ratio=1))
    approve(store, name, bundle_id, "alice", key, trusted)
    publish(store, name, bundle_id, "stable", trusted)


def die_at(store: ObjectStore, event: str, request: int) -> None:
    """Let this process be killed by its ``request``-th request."""
    counter = itertools.count(1)

    def strike(**_details: object) -> None:
        if next(counter) == request:
            os.kill(os.getpid(), signal.SIGKILL)

    store._client.meta.events.register({"sent": "after-call.s3", "unsent": "before-send.s3"}[event], strike)


def publisher(store: ObjectStore, name: str, key_file: Path, folders: list[Path], line: str) -> int:
    """The exit status of a fork that releases every bundle, or dies on the way."""
    process = os.fork()
    if process == 0:
        event, request = line.split()
        if event != "never":
            die_at(store, event, int(request))
        for folder in folders:
            release(store, name, key_file, folder)
        os._exit(0)
    return os.waitpid(process, 0)[1]


def main() -> None:
    name, key_file, *folders = sys.argv[1], Path(sys.argv[2]), *map(Path, sys.argv[3:])
    # Made before the fork, so that each one need not read the client's description of S3 again.
    store = ObjectStore(Settings.load())
    print("ready", flush=True)
    for line in sys.stdin:
        status = publisher(store, name, key_file, folders, line)
        print("killed" if os.WIFSIGNALED(status) else "done" if status == 0 else "failed", flush=True)


if __name__ == "__main__":
    main()
