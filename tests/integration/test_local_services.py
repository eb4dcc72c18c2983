"""The real servers: started, found healthy, killed, started again, stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import boto3
import psutil
import pytest
from botocore.exceptions import ClientError

from hydraopt.errors import ServiceError
from infra.adapter_registry import AdapterRegistry
from infra.local_services import down, processes, status, up
from infra.local_services.credentials import ensure_credentials
from infra.object_store import ObjectStore
from infra.settings import Settings

pytestmark = pytest.mark.integration

SERVICES = ("store", "mlflow", "prefect", "runner")
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.fixture(scope="module", autouse=True)
def no_variables():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
            patch.delenv(name)
        patch.setenv("AWS_SECRET_ACCESS_KEY", "of-somebody-else")
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory, no_variables):
    """A home folder with everything running."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("services") / "home"
    told = []
    try:
        start = time.monotonic()
        up(folder, progress=lambda *step: told.append(step))
        print(f"everything ready after {time.monotonic() - start:.1f} s: {told}")
        assert told[0] == (0, 4, "start store, mlflow, prefect, runner")
        assert told[-1][:2] == (4, 4)
        yield folder
    finally:
        down(folder)


@pytest.fixture
def store_only(tmp_path, monkeypatch):
    """A home folder in which `up` starts the store alone, in two seconds."""
    monkeypatch.setenv("HYDRAOPT_MLFLOW_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HYDRAOPT_PREFECT_API_URL", "http://127.0.0.1:9/api")
    folder = tmp_path / "home"
    yield folder
    down(folder)


def pids(home):
    return {name: status(home)[name].pid for name in SERVICES}


def everyone(home):
    return [process for name in SERVICES for process in processes.family(processes.mark(home, name))]


def kill(home, *names):
    """SIGKILL the first process of each service, and nothing else: what it started lives on."""
    for name in names:
        psutil.Process(status(home)[name].pid).kill()
    end = time.monotonic() + 10
    while any(status(home)[name].running for name in names):
        assert time.monotonic() < end
        time.sleep(0.1)


def up_in_another_process(home):
    script = f"from pathlib import Path; from infra.local_services import up; up(Path({str(home)!r}))"
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def test_every_service_is_healthy_and_has_a_log(home):
    for name in SERVICES:
        state = status(home)[name]
        assert (state.running, state.healthy, state.problem) == (True, True, None)
        assert state.address is None if name == "runner" else state.address.startswith("http://127.0.0.1:")
        assert state.log.exists()
    assert status(home).healthy


def test_settings_find_the_servers(home):
    settings = Settings.load(home).require_services()
    assert ObjectStore(settings).create("hello", b"there") is True
    assert ObjectStore(settings).read("hello")[0] == b"there"
    assert AdapterRegistry(settings).serving() == {}
    with urllib.request.urlopen(f"{settings.prefect_api_url}/health", timeout=10) as answer:
        assert answer.read() == b"true"


def test_every_port_is_on_loopback_only(home):
    listening = set()
    for process in everyone(home):
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN or connection.type != 1:
                listening.add((connection.laddr.port, connection.laddr.ip))
    assert len({port for port, _ in listening}) >= 5  # SeaweedFS alone has ten
    assert {address for _, address in listening} <= LOOPBACK, listening


def test_only_our_key_opens_the_store(home):
    settings = Settings.load(home)
    strangers = boto3.client(
        "s3", endpoint_url=settings.s3_endpoint, aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key="guessed", region_name="us-east-1",
    )  # fmt: skip
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        strangers.list_objects_v2(Bucket=settings.s3_bucket)


def test_the_parts_behind_the_store_let_nobody_in(home):
    """The filer and the volume server hold every object and speak plain HTTP."""
    ObjectStore(Settings.load(home)).create("secret", b"weights" * 1000)
    command = psutil.Process(status(home)["store"].pid).cmdline()
    ports = dict(part.lstrip("-").split("=") for part in command if ".port=" in part)
    for url, method in [
        (f"http://127.0.0.1:{ports['filer.port']}/buckets/hydraopt/secret", "GET"),
        (f"http://127.0.0.1:{ports['filer.port']}/buckets/hydraopt/forged", "PUT"),
        (f"http://127.0.0.1:{ports['filer.port']}/buckets/hydraopt/secret", "DELETE"),
        (f"http://127.0.0.1:{ports['volume.port']}/1,0100000000", "PUT"),
    ]:
        request = urllib.request.Request(url, method=method, data=b"x" if method == "PUT" else None)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        assert caught.value.code in {401, 403}, url


def test_nobody_deletes_objects_behind_the_keys(home, tmp_path):
    """SeaweedFS's own shell, as a stranger has it: without the certificate no part answers it."""
    store = ObjectStore(Settings.load(home))
    store.create("not-yours", b"weights")
    command = psutil.Process(status(home)["store"].pid).cmdline()
    ports = dict(part.lstrip("-").split("=") for part in command if ".port" in part)
    places = [
        f"-{part}=127.0.0.1:{ports[f'{part}.port']}.{ports[f'{part}.port.grpc']}"
        for part in ("master", "filer")
    ]
    shell = subprocess.Popen(
        [command[0], "shell", *places], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        said, _ = shell.communicate("fs.rm /buckets/hydraopt/not-yours\nfs.ls /buckets/hydraopt\n", timeout=8)
    except subprocess.TimeoutExpired:
        shell.kill()
        said, _ = shell.communicate()
    assert "not-yours" not in said
    assert store.read("not-yours")[0] == b"weights"


def test_keys_are_private_and_in_nobody_elses_hands(home):
    keys = ensure_credentials(home)
    assert (home / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o077 == 0
    for process in everyone(home):
        line = " ".join(process.cmdline())
        held = process.environ()
        is_store = held[processes.MARK].startswith("store@")
        for key in keys.values():
            assert key not in line
            assert (key in held.values()) <= is_store
        assert "of-somebody-else" not in held.values()
    for file in (home / "logs").iterdir():
        assert not any(key in file.read_text(errors="replace") for key in keys.values())


def test_telemetry_is_off(home):
    variables = {
        process.environ()[processes.MARK].split("@")[0]: process.environ() for process in everyone(home)
    }
    assert variables["mlflow"]["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert variables["mlflow"]["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"
    assert variables["prefect"]["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert variables["prefect"]["DO_NOT_TRACK"] == "1"
    assert variables["prefect"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"].endswith(".filesystem")
    assert "-master.telemetry=false" in psutil.Process(status(home)["store"].pid).cmdline()


def test_a_web_page_cannot_use_prefect(home):
    """Any page the user visits could start flows if Prefect answered its browser's question with yes."""
    request = urllib.request.Request(
        f"{Settings.load(home).prefect_api_url}/flows/filter", method="OPTIONS",
        headers={"Origin": "https://example.com", "Access-Control-Request-Method": "POST"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            allowed = answer.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        allowed = error.headers.get("Access-Control-Allow-Origin")
    assert allowed is None


def test_up_again_starts_nothing(home):
    before = pids(home)
    start = time.monotonic()
    up(home)
    assert time.monotonic() - start < 30
    assert pids(home) == before


def test_killed_services_come_back_alone_with_their_data_from_two_ups_at_once(home):
    """MLflow's first process leaves a second one behind that holds the port and the database."""
    before, settings = pids(home), Settings.load(home)
    ObjectStore(settings).create("kept", b"over a kill")
    left = home / "tmp" / "runner" / "prefect-workspace-attempt-of-a-run"
    left.mkdir()
    kill(home, "store", "mlflow", "runner")
    assert not status(home)["store"].healthy
    both = [up_in_another_process(home) for _ in range(2)]
    assert [(process.communicate()[1], process.returncode) for process in both] == [("", 0), ("", 0)]
    after = pids(home)
    assert after["prefect"] == before["prefect"]
    assert status(home).healthy
    assert Settings.load(home) == settings  # the same addresses and keys
    assert ObjectStore(settings).read("kept")[0] == b"over a kill"
    assert not left.exists()  # nobody else removes what a killed runner left
    leaders = [process for process in everyone(home) if process.pid in after.values()]
    assert len(leaders) == 4
    assert sum("uvicorn" in " ".join(process.cmdline()) for process in everyone(home)) == 1


def test_a_server_elsewhere_is_not_started(store_only):
    states = up(store_only, runner=False)
    assert states["store"].healthy
    assert states["mlflow"].elsewhere
    assert (states["prefect"].elsewhere, states["prefect"].running) == (True, False)
    assert not (store_only / "mlflow.db").exists()


def test_the_store_logs_below_the_home_alone(store_only, tmp_path, monkeypatch):
    """By itself it fills the folder for temporary files, where nobody looks and nobody clears up."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    log = up(store_only, runner=False)["store"].log
    assert "volume" in log.read_text()
    assert [path.name for path in temporary.iterdir() if ".log." in path.name] == []


def test_a_taken_port_is_passed_over_and_then_kept(store_only):
    first = up(store_only, runner=False)["store"]
    down(store_only)
    assert Settings.load(store_only).s3_endpoint is None
    again = up(store_only, runner=False)["store"]
    assert again.address == first.address
    assert again.pid != first.pid


def test_another_bucket_restarts_the_store_with_it(store_only, monkeypatch):
    first = up(store_only, runner=False)["store"]
    monkeypatch.setenv("HYDRAOPT_S3_BUCKET", "another")
    second = up(store_only, runner=False)["store"]
    assert second.pid != first.pid
    assert ObjectStore(Settings.load(store_only)).create("key", b"value") is True


def test_a_server_that_does_not_start_names_its_log(store_only):
    (store_only / "store").mkdir(parents=True)
    (store_only / "store" / "filerldb2").write_text("not a database")
    with pytest.raises(ServiceError, match=rf"store ended while starting.*{store_only}/logs/store\.log"):
        up(store_only, runner=False)
    assert not status(store_only)["store"].running


def test_a_server_that_dies_while_it_is_looked_at_is_started_again(store_only):
    """It was alive when `up` began, and ended before it answered."""
    up(store_only, runner=False)
    before = psutil.Process(status(store_only)["store"].pid)
    before.suspend()  # alive, and answers nothing
    killer = threading.Timer(1, before.kill)
    killer.start()
    state = up(store_only, runner=False)["store"]
    killer.join()
    assert state.healthy
    assert state.pid != before.pid


def test_down_leaves_no_process(home):
    """Last in this file: it stops the servers that the others use."""
    assert everyone(home)
    states = down(home)
    assert not any(service.running for service in states.services)
    assert everyone(home) == []
    assert Settings.load(home).s3_endpoint is None
