"""Merges on clusters: real ones of one worker, started here."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from tiny_adapters import write_adapter

import hydraopt
from hydraopt.errors import HydraoptError, ServiceError
from infra.local_services import ports
from infra.merge_workers import merge_workers
from infra.settings import Settings


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """``settings(address)``: what a process sees that is told of a cluster there."""

    def told_of(address):
        monkeypatch.setenv("HYDRAOPT_MERGE_WORKERS", address)
        return Settings.load(tmp_path / "home")

    return told_of


@pytest.fixture
def folders(tmp_path):
    return {f"t{seed}": write_adapter(tmp_path / f"t{seed}", seed) for seed in range(3)}


@pytest.fixture
def dask():
    """The address of a scheduler, which ends with the test."""
    distributed = pytest.importorskip("distributed", reason="needs: pip install 'hydraopt[dask]'")
    port = ports.choose({"dask": 18786})["dask"]
    with distributed.LocalCluster(
        n_workers=0, scheduler_port=port, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        yield cluster, f"dask://127.0.0.1:{port}"


@pytest.fixture
def ray():
    """The address of a head node with one core."""
    pytest.importorskip("ray", reason="needs: .venv/bin/pip install -c infra/constraints.txt 'ray[client]'")
    folder = tempfile.mkdtemp(prefix="ray")  # pytest's own folders are too long for the names of its sockets
    chosen = ports.choose({"gcs": 6379, "client": 20001})
    program = str(Path(sys.executable).with_name("ray"))
    node = subprocess.Popen(
        [
            *(program, "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=1"),
            *(f"--port={chosen['gcs']}", f"--ray-client-server-port={chosen['client']}"),
            *("--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=80000000"),
            f"--temp-dir={folder}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield f"ray://127.0.0.1:{chosen['client']}"
    everyone = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in everyone:
        process.kill()
    node.wait()
    shutil.rmtree(folder)


def test_a_dask_cluster_gives_the_same_bundle(settings, folders, dask):
    cluster, address = dask
    cluster.scale(1)
    cluster.wait_for_workers(1, timeout=60)
    with merge_workers(settings(address)) as executor:
        there = hydraopt.merge(folders, budget=0.9, executor=executor)
    assert there.id == hydraopt.merge(folders, budget=0.9).id


def test_a_scheduler_without_workers_is_named(settings, dask):
    _, address = dask
    with pytest.raises(ServiceError, match=f"{address} has no worker"), merge_workers(settings(address)):
        pass


def test_a_ray_cluster_gives_the_same_bundle(settings, folders, ray):
    with contextlib.ExitStack() as stack:
        executor = _entered(stack, settings(ray))
        there = hydraopt.merge(folders, budget=0.9, executor=executor)
    assert there.id == hydraopt.merge(folders, budget=0.9).id


@pytest.mark.filterwarnings("ignore:Ray Client connection timed out")
def test_a_server_that_is_no_ray_is_named(settings, monkeypatch):
    worker = pytest.importorskip("ray.util.client.worker", reason="needs: pip install 'hydraopt[ray]'")
    monkeypatch.setattr(worker, "INITIAL_TIMEOUT_SEC", 0.1)
    monkeypatch.setattr(worker, "MAX_TIMEOUT_SEC", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"ray://127.0.0.1:{other.getsockname()[1]}"
        said = f"Ray at {address} does not let us in: ray client"
        with pytest.raises(ServiceError, match=said), merge_workers(settings(address)):
            pass


def _entered(stack, settings):
    """The executor, once the cluster has started; a busy machine takes a minute, and more than one attempt."""
    end = time.monotonic() + 240
    while True:
        try:
            return stack.enter_context(merge_workers(settings))
        except ServiceError:
            if time.monotonic() > end:
                raise
            time.sleep(1)


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_cluster_that_is_not_there_is_named_at_once(settings, kind):
    address = f"{kind}://127.0.0.1:{ports.choose({'none': 18999})['none']}"
    said = f"cluster for merges does not answer at {address}"
    with pytest.raises(ServiceError, match=said), merge_workers(settings(address)):
        pass


def test_without_a_cluster_threads_of_this_process_merge(tmp_path):
    with merge_workers(Settings.load(tmp_path)) as executor:
        assert executor is None


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8786", "dask://127.0.0.1", "dask://me:secret@127.0.0.1:8786"]
)
def test_what_is_no_cluster_is_refused(settings, address):
    with pytest.raises(HydraoptError, match="MERGE_WORKERS") as refusal:
        settings(address)
    assert "secret@" not in str(refusal.value)
