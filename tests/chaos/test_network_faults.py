"""What a broken wire to the object store does to a release, a signature and a device: a clear failure, or nothing."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from invariants import check_store
from pipeline_home import Pipeline
from tcp_proxy import FAULTS, Choice, Fault, TcpProxy

import hydraopt
from hydraopt.errors import ServiceError
from infra.approvers import trust
from infra.candidates import list_candidates
from infra.device_pull import pull
from infra.object_store import ObjectStore
from infra.publishing import publish
from infra.signatures import public_key_pem

pytestmark = pytest.mark.integration

ATTEMPTS = 4  # more than a client makes
RARELY, OFTEN = 0.1, 0.5


def patterns(fault: Fault, chance: random.Random) -> dict[str, Choice]:
    """Which requests the fault hits."""
    first = chance.randint(1, 30)
    rare, frequent = random.Random(chance.random()), random.Random(chance.random())
    return {
        f"number {first}": lambda number, _: fault if number == first else None,
        f"{ATTEMPTS} from {first}": lambda number, _: fault if first <= number < first + ATTEMPTS else None,
        "rarely": lambda _, __: fault if rare.random() < RARELY else None,
        "often": lambda _, __: fault if frequent.random() < OFTEN else None,
        "always": lambda _, __: fault,
    }


def chosen(fault: Fault, chance: random.Random, *, everything: bool) -> dict[str, Choice]:
    """All patterns, or one that may fail and the one that does; nothing slow fails."""
    found = patterns(fault, chance)
    if everything:
        return found
    some = chance.choice([name for name in found if name != "always"])
    return {name: found[name] for name in (some, "always")}


@pytest.fixture
def proxy(running_store):
    with TcpProxy(running_store.address) as one:
        yield one


@pytest.fixture
def behind(alone, running_store, proxy, tmp_path):
    """The manager's store, through the proxy."""
    return ObjectStore(
        running_store.settings(
            tmp_path / "home", s3_bucket=alone.store.bucket, s3_endpoint=proxy.address, service_timeout_s=6
        )
    )


def check_told(message: str, address: str) -> None:
    """The address, what was being done, what is safe, and how to go on."""
    assert address in message
    assert " while " in message
    assert "what was stored before is whole and stays" in message.lower(), message
    assert "run this again" in message


@pytest.mark.parametrize("fault", FAULTS)
def test_release_and_device(alone, behind, proxy, chance, long_form, fault, tmp_path):  # noqa: PLR0917
    """Version 1 is live; what becomes of the release of version 2, and of a device that fetches it."""
    device, direct = tmp_path / "device", alone.store
    for seed, (pattern, choose) in enumerate(chosen(fault, chance, everything=long_form).items()):
        if seed == 0:
            publish(direct, alone.name, alone.approved(0), "stable", alone.trusted)
        before = check_store(direct, alone.name, alone.trusted)
        pull(direct, alone.name, "stable", device, alone.trusted)
        wanted = alone.approved(seed + 1)

        with proxy.breaking(choose) as broken:
            failed = None
            try:
                publish(behind, alone.name, wanted, "stable", alone.trusted)
            except ServiceError as error:
                failed = str(error)
                check_told(failed, proxy.address)
        assert failed is None or broken, pattern
        assert failed or fault == "slow" or pattern != "always"
        shown = check_store(direct, alone.name, alone.trusted)
        assert shown.version in ({before.version, before.version + 1} if failed else {before.version + 1})
        publish(behind, alone.name, wanted, "stable", alone.trusted)
        assert check_store(direct, alone.name, alone.trusted).bundle_id == wanted

        with proxy.breaking(choose) as broken:
            failed = None
            try:
                pull(behind, alone.name, "stable", device, alone.trusted)
            except ServiceError as error:
                failed = str(error)
                check_told(failed, proxy.address)
        assert failed is None or broken, pattern
        held = hydraopt.Bundle.load(device).id
        assert held in ({before.bundle_id, wanted} if failed else {wanted})
        pull(behind, alone.name, "stable", device, alone.trusted)
        assert hydraopt.Bundle.load(device).id == wanted


@pytest.fixture
def commands(alone, running_store, proxy, tmp_path):
    """A process for commands that reach the store through the proxy."""
    made = Pipeline(
        tmp_path,
        **replace(running_store, address=proxy.address).variables(alone.store.bucket),
        HYDRAOPT_SERVICE_TIMEOUT_S="6",
    )
    trust(made.home, alone.who, public_key_pem(alone.key))
    yield made
    made.stop()


def test_commands_say_what_is_wrong_and_how_to_go_on(alone, commands, proxy, tmp_path):
    """Exit code 2 and a message for people; the same command again does the rest."""
    publish(alone.store, alone.name, alone.approved(0), "stable", alone.trusted)
    waiting, _ = alone.judged(1)
    sign = [
        "approve",
        waiting,
        "--as",
        alone.who,
        "--key",
        commands.home / "alice.pem",
        "--no-release",
        "--json",
    ]
    fetch = ["pull", alone.name, "--out", tmp_path / "device", "--json"]
    for command in (sign, fetch, ["candidates", "--json"]):
        for fault in ("reset after", "half answer", "500 after", "503 instead"):
            with proxy.breaking(lambda _, __, fault=fault: fault) as broken:
                (result,) = commands.run(command)
            assert broken
            assert (result.code, result.json["kind"]) == (2, "ServiceError"), result
            check_told(result.json["error"], proxy.address)
        (result,) = commands.run(command)
        assert result.code == 0, result.stderr
    (status,) = [one for one in list_candidates(alone.store, alone.name) if one.bundle_id == waiting]
    assert status.state == "approved"
    assert hydraopt.Bundle.load(tmp_path / "device").id != waiting
    check_store(alone.store, alone.name, alone.trusted)
