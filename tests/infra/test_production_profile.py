"""What surrounds the production profile's servers: order, programs, accounts, passwords. No server is started here."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from hydraopt.errors import HydraoptError, ServiceError
from infra.local_services import database, health, processes
from infra.local_services.credentials import ensure_credentials
from infra.local_services.database import User
from infra.local_services.profiles import EXECUTORS, SERVICES, may_start
from infra.local_services.state import Record, Records
from infra.settings import Settings


@pytest.fixture
def server():
    """A server that answers what it is told, to those who log in as `ana:secret`."""
    answers = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # "ana:secret" in base64, as RFC 7617 writes credentials
            allowed = self.headers.get("Authorization") == "Basic YW5hOnNlY3JldA=="
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode() if allowed else b"")

        def log_message(self, *args):
            pass

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}", answers
    made.shutdown()
    made.server_close()


def test_servers_on_postgres_wait_until_it_is_ready():
    running = {"postgres"}
    for name in ("prefect", "mlflow"):
        assert not may_start("production", name, running=running, ready=set())
        assert may_start("production", name, running=set(), ready={"postgres"})
        assert may_start("local", name, running=set(), ready=set())
    assert may_start("production", "store", running=set(), ready=set())


@pytest.mark.parametrize("profile", ["local", "production"])
def test_executors_start_once_every_server_runs(profile):
    """They load their libraries meanwhile, and wait by themselves."""
    servers = set(SERVICES[profile]) - EXECUTORS
    for name in set(SERVICES[profile]) & EXECUTORS:
        assert may_start(profile, name, running=servers, ready=set())
        for missing in servers:
            assert not may_start(profile, name, running=servers - {missing}, ready=set())


def test_a_home_keeps_the_profile_it_began_with(home):
    assert Records.read(home).profile == "local"
    records = Records().choose(home, "production")
    assert Records.read(home).profile == "production"
    records = records.put(home, "store", Record(address="http://127.0.0.1:8333"))
    assert records.choose(home, None).profile == "production"
    with pytest.raises(HydraoptError, match=r"has the profile 'production'.*HYDRAOPT_HOME"):
        Records.read(home).choose(home, "local")


def test_settings_find_the_passwords_of_our_own_servers(home):
    secrets = ensure_credentials(home, production=True)
    records = Records().choose(home, "production")
    for name, port in (("store", 8333), ("mlflow", 5000), ("prefect", 4200)):
        records = records.put(home, name, Record(address=f"http://127.0.0.1:{port}", pid=1, started=1.0))
    settings = Settings.load(home)
    assert settings.passwords() == {
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": secrets["mlflow_admin_password"],
        "PREFECT_API_AUTH_STRING": f"admin:{secrets['prefect_password']}",
    }
    for secret in secrets.values():
        assert secret not in repr(settings.model_copy(update={"s3_access_key": None}))
        assert secret not in settings.environment().values()


def test_our_passwords_go_to_no_other_server(home, monkeypatch):
    ensure_credentials(home, production=True)
    records = Records()
    for name, port in (("mlflow", 5000), ("prefect", 4200)):
        records = records.put(home, name, Record(address=f"http://127.0.0.1:{port}", pid=1, started=1.0))
    monkeypatch.setenv("HYDRAOPT_MLFLOW_URI", "https://mlflow.example")
    monkeypatch.setenv("HYDRAOPT_PREFECT_API_URL", "https://prefect.example/api")
    assert Settings.load(home).passwords() == {}


def test_the_local_profile_has_no_passwords(home):
    ensure_credentials(home)
    Records().put(home, "mlflow", Record(address="http://127.0.0.1:5000", pid=1, started=1.0))
    assert Settings.load(home).passwords() == {}


@pytest.mark.parametrize("auth", ["ana", "ana:", ":secret"])
def test_half_a_login_is_refused_and_not_shown(home, monkeypatch, auth):
    monkeypatch.setenv("HYDRAOPT_PREFECT_AUTH", auth)
    with pytest.raises(
        HydraoptError, match="HYDRAOPT_PREFECT_AUTH: a user, a colon and a password"
    ) as refused:
        Settings.load(home)
    assert "secret" not in str(refused.value)


def test_a_user_without_a_password_is_refused(home, monkeypatch):
    monkeypatch.setenv("HYDRAOPT_MLFLOW_USERNAME", "ana")
    with pytest.raises(HydraoptError, match="HYDRAOPT_MLFLOW_PASSWORD together"):
        Settings.load(home)


def test_a_missing_postgres_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(database, "_PLACES", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServiceError, match=r"PostgreSQL 14 or newer.*apt-get install postgresql"):
        database.program("postgres")


def test_the_newest_postgres_is_taken_by_number_and_not_by_name(monkeypatch, tmp_path):
    for version in ("9.6", "14", "15"):
        (tmp_path / version / "bin").mkdir(parents=True)
        for name in ("initdb", "postgres"):
            (tmp_path / version / "bin" / name).touch()
    monkeypatch.setattr(database, "_PLACES", (str(tmp_path),))
    assert database.program("postgres") == str(tmp_path / "15" / "bin" / "postgres")


def test_a_postgres_too_old_is_not_taken(monkeypatch, tmp_path):
    (tmp_path / "13" / "bin").mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (tmp_path / "13" / "bin" / name).touch()
    monkeypatch.setattr(database, "_PLACES", (str(tmp_path),))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServiceError, match="PostgreSQL 14 or newer"):
        database.program("postgres")


def test_an_ordinary_user_runs_postgres_as_such(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert database.run_as() is None


def test_root_gives_postgres_an_ordinary_account(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    user = database.run_as()
    assert user.uid != 0
    monkeypatch.setattr(database, "_UNPRIVILEGED", ("no-such-user",))
    with pytest.raises(ServiceError, match=r"refuses to run as root.*no-such-user"):
        database.run_as()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away; run the tests as root for it")
def test_a_folder_closed_to_postgres_is_named(tmp_path):
    """pytest's own folders are its user's alone: the way to the home is closed."""
    (tmp_path / "closed" / "home").mkdir(parents=True)
    (tmp_path / "closed").chmod(0o700)
    account = User("nobody", 65534, 65534)
    with pytest.raises(ServiceError, match=r"'nobody' cannot enter .*HYDRAOPT_HOME"):
        database.make_cluster(tmp_path / "closed" / "home" / "postgres", "x", account)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root starts processes as others; run the tests as root for it"
)
def test_a_service_runs_as_the_account_it_is_given(tmp_path):
    account = User("nobody", 65534, 65534)
    pid, started = processes.start(
        ["/bin/sleep", "60"],
        environment={processes.MARK: "x@y"},
        folder=tmp_path,
        log=tmp_path / "log",
        user=account,
    )
    assert psutil.Process(pid).uids().effective == 65534
    assert psutil.Process(pid).gids().effective == 65534
    assert processes.stop(processes.find(pid, started), "x@y", grace_s=5)


def test_a_half_made_cluster_is_made_again(home, monkeypatch):
    """`initdb` was killed: what it left is not taken for a cluster."""
    folder = home / "postgres"
    (folder / "data.new").mkdir(parents=True)
    (folder / "data.new" / "half").touch()
    seen = []

    def initdb(command, *args):
        (made,) = (part.removeprefix("--pgdata=") for part in command if part.startswith("--pgdata="))
        Path(made).mkdir()
        seen.append((folder / "password").read_text())

    monkeypatch.setattr(database, "program", lambda name: name)
    monkeypatch.setattr(database, "_run", initdb)
    database.make_cluster(folder, "secret", None)
    database.make_cluster(folder, "another", None)
    assert seen == ["secret\n"]
    assert sorted(path.name for path in folder.iterdir()) == ["data"]
    assert list((folder / "data").iterdir()) == []


def test_a_signal_of_its_own_ends_a_service(tmp_path):
    """PostgreSQL would wait for its clients after SIGTERM."""
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        # what a shell starts in the background inherits an ignored SIGINT
        "signal.signal(signal.SIGINT, signal.default_int_handler); print(1, flush=True); time.sleep(60)"
    )
    log = tmp_path / "log"
    pid, started = processes.start(
        [sys.executable, "-c", script],
        environment={**os.environ, processes.MARK: "a@b"},
        folder=tmp_path,
        log=log,
    )
    end = time.monotonic() + 20
    while not log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert processes.stop(processes.find(pid, started), "a@b", grace_s=60, ask=signal.SIGINT)
    assert "KeyboardInterrupt" in log.read_text()  # it was asked by that signal, and not killed


def test_a_worker_is_healthy_while_it_reports(server):
    address, answers = server
    path = "/api/work_pools/gpu/workers/filter"
    ask = lambda started: health.check_worker(address, "worker-gpu", "gpu", started, "ana:secret")  # noqa: E731
    now = time.time()

    answers[path] = []
    with pytest.raises(health.UnhealthyError, match="has not reported"):
        ask(0.0)
    beat = datetime.fromtimestamp(now, UTC).isoformat()
    answers[path] = [{"name": "worker-gpu", "last_heartbeat_time": beat}]
    ask(now - 1)
    with pytest.raises(health.UnhealthyError, match="has not reported"):
        ask(now + 1)  # the report is of the process before this one
    answers[path] = [{"name": "worker-cpu", "last_heartbeat_time": beat}]
    with pytest.raises(health.UnhealthyError, match="has not reported"):
        ask(0.0)
    silent = datetime.fromtimestamp(now - 600, UTC).isoformat()
    answers[path] = [{"name": "worker-gpu", "last_heartbeat_time": silent}]
    with pytest.raises(health.UnhealthyError, match="has not reported"):
        ask(0.0)


def test_a_wrong_password_is_not_healthy(server):
    address, answers = server
    answers["/api/work_pools/cpu/workers/filter"] = []
    with pytest.raises(health.UnhealthyError, match="answers 401"):
        health.check_worker(address, "worker-cpu", "cpu", 0.0, "ana:guessed")


@pytest.mark.parametrize("service", ["mlflow", "prefect", "worker-cpu"])
def test_a_containers_probe_fails_with_its_reason(service):
    """Nothing listens on port 9."""
    command = [sys.executable, "-m", "infra.local_services.probe", service, "http://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
