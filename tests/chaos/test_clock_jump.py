"""The clock of a client jumps: what it signs is refused by name, or dated so that nobody counts on it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from invariants import check_store
from pipeline_home import Pipeline

import hydraopt
from hydraopt.errors import HydraoptError
from infra.approvers import trust
from infra.candidates import list_candidates
from infra.publishing import publish
from infra.records import read_record
from infra.signatures import public_key_pem

pytestmark = pytest.mark.integration


@pytest.fixture
def clock(tmp_path) -> Path:
    """A file that libfaketime reads at every look at the clock."""
    path = tmp_path / "clock"
    path.write_text("+0")
    return path


@pytest.fixture
def commands(alone, running_store, clock, tmp_path):
    """A process for commands whose clock can be moved while it runs; the store's stays right."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("a moved clock needs libfaketime: `apt-get install faketime`")
    made = Pipeline(
        tmp_path,
        **running_store.variables(alone.store.bucket),
        LD_PRELOAD=str(library),
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    trust(made.home, alone.who, public_key_pem(alone.key))
    yield made
    made.stop()


def test_days_off(alone, commands, clock, running_store, tmp_path):
    """The store refuses what is signed days from its own time; nothing is half done, the right time mends it."""
    first = alone.approved(0)
    publish(alone.store, alone.name, first, "stable", alone.trusted)
    waiting, _ = alone.judged(1)
    sign = ["approve", waiting, "--as", alone.who, "--key", commands.home / "alice.pem", "--no-release"]
    fetch = ["pull", alone.name, "--out", tmp_path / "device"]
    commands.good(fetch)
    for jump in ("+3d", "-3d"):
        clock.write_text(jump)
        for command in (sign, fetch):
            (result,) = commands.run([*command, "--json"])
            assert (result.code, result.json["kind"]) == (2, "ServiceError"), result
            assert running_store.address in result.json["error"]
            assert "clock" in result.json["error"], result.json["error"]
        assert read_record(alone.store, alone.name, waiting, "approved") is None
        assert hydraopt.Bundle.load(tmp_path / "device").id == first
        clock.write_text("+0")
        commands.good(fetch)
    commands.good(sign)
    publish(alone.store, alone.name, waiting, "stable", alone.trusted)
    assert check_store(alone.store, alone.name, alone.trusted).bundle_id == waiting


def test_approval_from_the_future(alone, commands, clock):
    """A clock that the store still takes, but too far ahead for an approval: it does not count before its time."""
    waiting, _ = alone.judged(1)
    clock.write_text("+13m")
    sign = ["approve", waiting, "--as", alone.who, "--key", commands.home / "alice.pem", "--no-release"]
    commands.good(sign)
    record = read_record(alone.store, alone.name, waiting, "approved")
    ahead = datetime.fromisoformat(record.content["time"]) - datetime.now(UTC)
    assert ahead > timedelta(minutes=11), "the clock was not moved"
    with pytest.raises(HydraoptError, match="check the clocks"):
        publish(alone.store, alone.name, waiting, "stable", alone.trusted)
    (status,) = list_candidates(alone.store, alone.name)
    assert status.version is None
    clock.write_text("+0")
    commands.good(sign)
    publish(alone.store, alone.name, waiting, "stable", alone.trusted)
    assert check_store(alone.store, alone.name, alone.trusted).bundle_id == waiting
