"""Full disks: the store's and a device's, each a small tmpfs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from invariants import check_store
from managers import Manager
from running_store import RunningStore, started_store

import hydraopt
from hydraopt.errors import HydraoptError, ServiceError
from infra.blobs import BlobRef
from infra.device_pull import pull
from infra.object_store import ObjectStore
from infra.publishing import publish

pytestmark = pytest.mark.integration

STORE_MB = 48
BLOBS = (4 * 2**20, 2**18, 2**12)
"""Bytes of what fills the store's disk, the largest first: in the end nothing fits."""
MOST_BLOBS = 200


class Disk:
    """A mounted tmpfs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Disk]]:
    """``disk("8m")``: a new one of that size."""
    mounted: list[Path] = []

    def mount(size: str) -> Disk:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(
                f"a small disk needs the right to mount ({done.stderr.strip()}): run as root, in a container with "
                "`docker run --cap-add SYS_ADMIN`"
            )
        mounted.append(folder)
        return Disk(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def office_in(manager: Manager, running: RunningStore, home: Path) -> Manager:
    return replace(manager, store=ObjectStore(running.settings(home)))


def fill(store: ObjectStore, chance) -> dict[str, BlobRef]:
    """Store blobs until none fits; what was acknowledged, by its size and number."""
    stored: dict[str, BlobRef] = {}
    for size in BLOBS:
        for number in range(MOST_BLOBS):
            try:
                stored[f"{size} {number}"] = store.put_blob(chance.randbytes(size))
            except ServiceError as error:
                message = str(error)
                break
        else:
            pytest.fail(f"{MOST_BLOBS} blobs of {size} bytes fit into {STORE_MB} MB")
    assert store.address in message
    assert "disk is full" in message
    assert "run this again" in message
    return stored


def test_store_with_a_full_disk(manager, disk, chance, tmp_path):
    """What was stored stays and is served; a release fails by name, and goes through when there is room."""
    place = disk(f"{STORE_MB}m")
    with started_store(place.folder) as running:
        office = office_in(manager, running, tmp_path)
        first, second = office.approved(1), office.approved(2)
        publish(office.store, office.name, first, "stable", office.trusted)
        stored = fill(office.store, chance)
        for attempt in range(2):
            with pytest.raises(ServiceError, match=office.store.address):
                publish(office.store, office.name, second, "stable", office.trusted)
            shown = check_store(office.store, office.name, office.trusted)
            assert shown.bundle_id == first, attempt

    place.resize("256m")
    with started_store(place.folder) as running:
        office = office_in(manager, running, tmp_path)
        assert all(office.store.exists_blob(ref) for ref in stored.values())
        publish(office.store, office.name, second, "stable", office.trusted)
        assert check_store(office.store, office.name, office.trusted).bundle_id == second


def test_device_with_a_full_disk(alone, disk):
    """It keeps the version it has, says that the disk is full, and goes on when there is room."""
    place = disk("1m")
    out = place.folder / "device"
    first, second = alone.approved(1), alone.approved(2)
    publish(alone.store, alone.name, first, "stable", alone.trusted)
    pull(alone.store, alone.name, "stable", out, alone.trusted)
    publish(alone.store, alone.name, second, "stable", alone.trusted)
    with (place.folder / "other").open("wb", buffering=0) as other:  # as another program fills it
        try:
            while True:
                other.write(bytes(4096))
        except OSError:
            pass

    for _ in range(2):
        with pytest.raises(HydraoptError, match="No space left on device") as told:
            pull(alone.store, alone.name, "stable", out, alone.trusted)
        assert str(out) in str(told.value)
        assert "stays as it was" in str(told.value)
        assert "run this again" in str(told.value)
        assert hydraopt.Bundle.load(out).id == first
    place.resize("8m")
    assert pull(alone.store, alone.name, "stable", out, alone.trusted).bundle_id == second
    assert hydraopt.Bundle.load(out).id == second
