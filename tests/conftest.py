"""What every test may ask for: a real object store, started once, on loopback, and a manager of bundles in it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from managers import Manager
from running_store import RunningStore, started_store
from tiny_adapters import write_adapter, write_bundle

from infra.object_store import ObjectStore
from infra.settings import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "what tests/chaos breaks, and how often")
    group.addoption("--chaos-long", action="store_true", help="the long form, an hour: `make chaos`")
    group.addoption("--chaos-seed", type=int, default=1, help="repeats what a run with this seed broke")


def pytest_report_header(config: pytest.Config) -> str:
    form = "long" if config.getoption("--chaos-long") else "short"
    return f"chaos: {form} form, --chaos-seed={config.getoption('--chaos-seed')}"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves digests in the home of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def running_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStore]:
    """One real SeaweedFS for the whole session, with random keys, in a temporary folder."""
    with started_store(tmp_path_factory.mktemp("store")) as store:
        yield store


@pytest.fixture
def store_settings(running_store: RunningStore, tmp_path: Path) -> Settings:
    """Settings of one test: the session's store, a home folder of its own."""
    return running_store.settings(tmp_path / "home")


@pytest.fixture(scope="session")
def object_store(running_store: RunningStore, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """The session's store. Tests share the bucket: use names of your own (``unique_name``)."""
    return ObjectStore(running_store.settings(tmp_path_factory.mktemp("home")))


@pytest.fixture
def unique_name() -> str:
    """A bundle or task name no other test uses."""
    return f"t-{secrets.token_hex(6)}"


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Callable[[int], Path]:
    """``adapter_folder(seed)``: a PEFT folder."""
    return lambda seed: write_adapter(tmp_path / f"adapter-{seed}-{os.urandom(3).hex()}", seed)


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Callable[[int], Path]:
    """``bundle_folder(seed)``: a merged bundle of the tasks ``a`` and ``b``."""
    return lambda seed: write_bundle(tmp_path, seed)


@pytest.fixture
def manager(object_store: ObjectStore, unique_name: str, bundle_folder: Callable[[int], Path]) -> Manager:
    """Alice, who may approve, with a bundle name of her own."""
    keys = (Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate())
    return Manager(object_store, unique_name, "alice", *keys, bundle_folder)
