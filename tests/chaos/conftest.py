"""Break the pipeline in every way we can think of, and see that nothing is lost. On real servers, on loopback.

What is broken, one file each:

    test_killed_publishers.py   the publishing process, by SIGKILL at every request it makes and in between
    test_scale.py               nothing: a thousand adapters go all the way, fifty in the short form
    test_many_publishers.py     nothing: many processes publish at once, 32 in the long form; then half of them die
    test_many_reconciles.py     nothing: a hundred ask for a reconcile at once
    test_network_faults.py      the wire: latency, resets, half answers, 500s and 503s, through tcp_proxy.py
    test_full_disk.py           the store's disk and a device's, on small tmpfs mounts (needs root)
    test_killed_services.py     workers, a merge, Prefect, MLflow, PostgreSQL, SeaweedFS, alone and in pairs
    test_mlflow_faults.py       the wire again, to MLflow
    test_clock_jump.py          the clock of a client, days forward and back (needs libfaketime)
    test_security_files.py      files from strangers, and links in their folders
    test_security_servers.py    single bits of what vouches for a bundle; keys that may not do what they are used for

What must hold afterwards is in invariants.py, and it is the same for all: the live version is a whole, signed,
approved bundle; no version number is given twice; no blob is bad; nothing that was acknowledged is missing.

The short form runs with every other test and takes a seeded sample; `make chaos` is the long form, which tries
everything. ``--chaos-seed`` draws another sample, and repeats a failure: pytest's header shows the seed. Every test
draws from the seed and its own name, so one test repeats alone as it ran among the others.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from managers import Manager
from office import Office, open_office
from publishers import Publishers
from running_store import RunningStore

from infra.object_store import ObjectStore
from infra.signatures import generate_key, load_private_key
from infra.supply_chain.service_key import service_key


@pytest.fixture
def long_form(request: pytest.FixtureRequest) -> bool:
    """Whether everything is tried, and not a sample."""
    return bool(request.config.getoption("--chaos-long"))


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """What draws in this test."""
    return random.Random(f"{request.config.getoption('--chaos-seed')} {request.node.name}")


@pytest.fixture(scope="package")
def office() -> Iterator[Office]:
    """The production profile with a live version, for all tests in this folder."""
    pytest.importorskip("prefect")
    with open_office() as made:
        yield made
    if made.measured:
        print("\n" + "\n".join(made.measured))


@pytest.fixture
def alone(manager: Manager, running_store: RunningStore, tmp_path) -> Manager:
    """The manager, with the keys that the publishers sign with and a bucket that nobody else writes to."""
    home = tmp_path / "home"
    home.mkdir()
    generate_key(home / "alice.pem")
    key = load_private_key(home / "alice.pem")
    store = ObjectStore(running_store.settings(home, s3_bucket=f"chaos-{secrets.token_hex(6)}"))
    store._client.create_bucket(Bucket=store.bucket)
    return replace(manager, store=store, key=key, service=service_key(home))


@pytest.fixture
def publishers(alone: Manager, running_store: RunningStore, tmp_path) -> Iterator[Callable[..., Publishers]]:
    """``publishers(*folders)``: processes that release these as the manager does, in the manager's bucket."""
    started = []

    def start(*folders) -> Publishers:
        started.append(Publishers(alone, running_store, tmp_path / "home", folders))
        return started[-1]

    yield start
    for one in started:
        one.stop()
