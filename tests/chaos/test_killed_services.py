"""Servers, workers and a merge are killed while a change goes through; `hydraopt up` and one reconcile mend it.

A change: an adapter is ingested, the set merged, the candidate signed and released. Whatever a command
acknowledged with exit code 0 must be there afterwards, and what failed must have said so plainly.
"""

from __future__ import annotations

import itertools
import random
import threading
import time

import pytest
from invariants import check_store, versions
from office import Change, Office
from service_kills import VICTIMS, Striker, draw

from infra import local_services
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import fetch_adapter, load_adapter_version
from infra.approvers import approvers_of
from infra.candidates import list_candidates
from infra.settings import Settings

pytestmark = pytest.mark.integration


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Everyone alone and in pairs; or one pair, since each case takes most of a minute."""
    if "victims" not in metafunc.fixturenames:
        return
    pairs = list(itertools.combinations(VICTIMS, 2))
    cases = [(one,) for one in VICTIMS] + pairs
    if not metafunc.config.getoption("--chaos-long"):
        cases = [random.Random(metafunc.config.getoption("--chaos-seed")).choice(pairs)]
    metafunc.parametrize("victims", cases, ids=["-and-".join(case) for case in cases])


def test_killed_while_a_change_goes_through(office, chance, victims):
    strike = draw(victims, office.lasts, chance)
    print(f"\n{strike}", flush=True)
    before = check_store(office.store(), "tiny", approvers_of(office.home, "tiny"))
    change = Change(office, office.next_adapter())
    striker = Striker(office.home, strike)

    def go() -> None:
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
