"""The whole production profile, run for real: every server, every password, both work pools."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest

import infra
from hydraopt.errors import HydraoptError, ServiceError
from infra import local_services
from infra.local_services.credentials import ensure_credentials
from infra.object_store import ObjectStore
from infra.settings import Settings

pytest.importorskip("prefect")

import tiny_tasks
from pipeline_home import production_pipeline
from production_home import SERVICES, api, ask, everyone, role_variables

psycopg2 = pytest.importorskip("psycopg2", reason="needs the extra `production`")

pytestmark = pytest.mark.integration

LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
TASKS = ("topic", "first")
RUN_LIMIT_S = 150


@pytest.fixture(scope="module")
def stack():
    with production_pipeline() as made:
        yield made


@pytest.fixture(scope="module")
def reconciled(stack):
    """Two adapters ingested here; merged, measured and judged by the workers."""
    from hydraopt.evaluation.task_file import TaskFile
    from hydraopt.training.finetune import finetune

    tiny_tasks.write_bundle_file(stack.home, stack.encoder, list(TASKS))
    for task in TASKS:
        file = stack.task(task)
        finetune(TaskFile.load(file), stack.folder / task, work=stack.folder / "work", device="cpu")
        stack.good(["ingest", stack.folder / task, "--task", task, "--task-file", file])
    state = run_deployment(stack.home, "reconcile")
    assert state["type"] == "COMPLETED", state[
        "message"
    ]  # by itself, or by the event's run that did the same
    (listed,) = stack.good(["candidates"])
    (candidate,) = listed["candidates"]
    return candidate["bundle_id"]


@pytest.fixture(scope="module")
def released(stack, reconciled):
    """The candidate signed and live; the approver's name is known to whoever has the public key."""
    key = stack.folder / "ana.pem"
    _, approved = stack.good(
        ["keygen", "ana", "--key", key], ["approve", reconciled, "--as", "ana", "--key", key]
    )
    assert approved["released"]["live_version"] == 1
    return reconciled


def run_deployment(home: Path, name: str) -> dict[str, Any]:
    """Start it as Prefect's page does, and wait for its end."""
    deployment = api(home, f"deployments/name/{name}/{name}")
    run = api(home, f"deployments/{deployment['id']}/create_flow_run", {})
    end = time.monotonic() + RUN_LIMIT_S
    while run["state"]["type"] not in {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}:
        assert time.monotonic() < end, f"{name} is still {run['state']}: see {home}/logs"
        time.sleep(1)
        run = api(home, f"flow_runs/{run['id']}")
    return run["state"]


def finished_runs(home: Path) -> set[str]:
    body = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    return {run["id"] for run in api(home, "flow_runs/filter", body)}


def store_as(home: Path, role: str, tmp_path: Path) -> ObjectStore:
    """The store with what stands in the role's file of variables."""
    return ObjectStore(Settings(home=tmp_path, **{
        name.removeprefix("HYDRAOPT_").lower(): value for name, value in role_variables(home, role).items()
    }))  # fmt: skip


def test_every_service_is_healthy(stack):
    services = local_services.status(stack.home)
    assert [service.name for service in services.services] == list(SERVICES)
    assert services.healthy, services
    assert services.profile == "production"


def test_a_home_keeps_its_profile(stack):
    with pytest.raises(HydraoptError, match=r"has the profile 'production'.*HYDRAOPT_HOME"):
        local_services.up(stack.home, profile="local")


def test_postgres_is_no_root_and_its_data_closed(stack):
    server = psutil.Process(local_services.status(stack.home)["postgres"].pid)
    assert server.uids().effective != 0
    assert (stack.home / "postgres" / "data").stat().st_mode & 0o077 == 0
    assert stack.home.stat().st_mode & 0o067 == 0  # its group may pass, nobody may list


def test_every_port_is_on_loopback_only(stack):
    listening = {
        (connection.laddr.port, connection.laddr.ip)
        for process in everyone(stack.home)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN or connection.type != 1
    }
    assert len({port for port, _ in listening}) >= 8, listening  # SeaweedFS alone has five
    assert {address for _, address in listening} <= LOOPBACK, listening


def test_the_pools_do_their_own_work(stack, reconciled):
    """Reconcile ran on the CPU's worker, the merge on the GPU's, which says what it computes on."""
    runs = api(stack.home, "flow_runs/filter", {})
    pools = {(run["work_pool_name"], run["deployment_id"]) for run in runs if run["deployment_id"]}
    names = {entry["id"]: entry["name"] for entry in api(stack.home, "deployments/filter", {})}
    assert {(pool, names[deployment]) for pool, deployment in pools} >= {
        ("cpu", "reconcile"),
        ("gpu", "merge-set"),
    }
    import torch

    expected = "computes on" if torch.cuda.is_available() else "no CUDA device here"
    assert expected in (stack.home / "logs" / "worker-gpu.log").read_text()


def check_deployments(home: Path) -> None:
    """The server's deployments are those of the file: code, pool, schedule and limit."""
    from flows.deployments import read_entries

    held = {entry["name"]: entry for entry in api(home, "deployments/filter", {})}
    assert held.keys() == {entry.name for entry in read_entries()}
    for entry in read_entries():
        one = held[entry.name]
        assert (one["entrypoint"], one["work_pool_name"]) == (entry.entrypoint, entry.work_pool.name)
        planned = [schedule["schedule"].get("interval") for schedule in one["schedules"]]
        assert planned == [every.interval for every in entry.schedules]
        limit, options = one["global_concurrency_limit"], one["concurrency_options"]
        if entry.concurrency_limit is None:
            assert limit is None
        else:
            assert (limit["limit"], options["collision_strategy"]) == (1, "ENQUEUE")


def test_workers_and_prefects_own_command_make_the_same_deployments(stack, tmp_path):
    """The file is no dialect of ours: `prefect deploy` takes it, too."""
    check_deployments(stack.home)
    settings = Settings.load(stack.home)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file"]
    done = subprocess.run(
        [*command, str(Path(infra.__file__).with_name("prefect.yaml"))],
        env={**os.environ, **settings.environment(), **settings.passwords()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_deployments(stack.home)


def test_a_device_pulls_with_the_readers_key(stack, released, tmp_path):
    """Its own home holds the approver's public key and nothing else."""
    home = tmp_path / "device-home"
    (home / "approvers").mkdir(parents=True)
    (home / "approvers" / "ana.pem").write_bytes((stack.home / "approvers" / "ana.pem").read_bytes())
    variables = {**role_variables(stack.home, "reader"), "HYDRAOPT_HOME": str(home)}
    pulled = stack.run_with(variables, ["pull", "tiny", "--out", tmp_path / "device", "--json"])
    assert pulled.code == 0, pulled.stderr
    assert pulled.json["bundle_id"] == released


@pytest.mark.parametrize(
    "key", ["channels/tiny/stable.json", "bundles/x", "records/x", "blobs/x", "adapters/x"]
)
def test_the_readers_key_cannot_write(stack, key, tmp_path):
    with pytest.raises(ServiceError, match="AccessDenied"):
        store_as(stack.home, "reader", tmp_path).create(key, b"forged")


def test_the_trainers_key_writes_adapters_and_publishes_nothing(stack, released, tmp_path):
    """Whoever trains can neither release nor write what a decision rests on."""
    again = [
        "ingest",
        stack.folder / "first",
        "--task",
        "topic",
        "--task-file",
        stack.task("topic"),
        "--json",
    ]
    ingested = stack.run_with(role_variables(stack.home, "trainer"), again)
    assert ingested.code == 0, ingested.stderr
    assert not ingested.json["known"]
    stack.good(
        ["ingest", stack.folder / "topic", "--task", "topic"]
    )  # what the release was made of serves again
    store = store_as(stack.home, "trainer", tmp_path)
    for key in (
        "channels/tiny/canary.json",
        "bundles/tiny/versions/000002.json",
        "records/tiny/x/approved.json",
    ):
        with pytest.raises(ServiceError, match="AccessDenied"):
            store.create(key, b"forged")
    channel = store.read("channels/tiny/stable.json")
    assert channel is not None
    with pytest.raises(ServiceError, match="AccessDenied"):
        store.replace("channels/tiny/stable.json", b"forged", channel[1])


@pytest.mark.parametrize("login", ["", "admin:guessed", "admin:password1234"])
def test_mlflow_and_prefect_refuse_without_the_password(stack, login):
    settings = Settings.load(stack.home)
    for url, body in (
        (f"{settings.mlflow_uri}/api/2.0/mlflow/registered-models/search", None),
        (f"{settings.prefect_api_url}/flows/count", {}),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(url, body, login)
        assert refused.value.code == 401, url


def test_mlflow_refuses_another_host_name(stack):
    """A web page that points its own name at this machine gets nothing."""
    request = urllib.request.Request(
        f"{Settings.load(stack.home).mlflow_uri}/", headers={"Host": "evil.example"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 403


def test_each_database_opens_to_its_own_user_and_password(stack):
    secrets = ensure_credentials(stack.home, production=True)
    port = int(local_services.status(stack.home)["postgres"].address.rpartition(":")[2])

    def connect(user: str, password: str, name: str) -> None:
        psycopg2.connect(host="127.0.0.1", port=port, user=user, password=password, dbname=name).close()

    for name in ("prefect", "mlflow"):
        connect(name, secrets[f"{name}_database_password"], name)
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            connect(name, "guessed", name)
    with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
        connect("mlflow", secrets["mlflow_database_password"], "prefect")


def test_a_restart_keeps_everything(stack, released):
    """The databases, the store, the addresses, the release; then `down` leaves no process."""
    before = Settings.load(stack.home)
    runs = finished_runs(stack.home)
    stack.stop()
    local_services.down(stack.home)
    assert everyone(stack.home) == []
    local_services.up(stack.home)
    assert Settings.load(stack.home) == before
    assert finished_runs(stack.home) >= runs
    result = stack.run_with({}, ["status", "--json"]).json
    assert result["healthy"]
    assert result["bundles"]["tiny"]["live_bundle_id"] == released
    assert result["bundles"]["tiny"]["up_to_date"]
