"""What surrounds the servers: ports, processes, records. No server is started here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from hydraopt.errors import HydraoptError, ServiceError
from infra.local_services import down, ports, processes, status
from infra.local_services.definition import empty_temporary_folder
from infra.local_services.state import Record, Records
from infra.settings import home_folder

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def stranger():
    """A process that has nothing to do with us."""
    process = subprocess.Popen(SLEEP)
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def run(home, name, *command):
    """Start a process the way a service is started."""
    value = processes.mark(home, name)
    environment = {**os.environ, processes.MARK: value}
    started = processes.start(command, environment=environment, folder=home, log=home / "log")
    end = time.monotonic() + 10
    # The kernel shows a new program's variables an instant after it has begun.
    while started[0] not in {process.pid for process in processes.family(value)}:
        assert time.monotonic() < end
    return started


def wait_until(condition, what):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def test_the_preferred_port_is_taken_if_free():
    with socket.socket() as probe:
        probe.bind((ports.HOST, 0))
        port = probe.getsockname()[1]
    assert ports.choose({"http": port}) == {"http": port}


def test_a_busy_or_kept_port_is_passed_over():
    with socket.socket() as busy:
        busy.bind((ports.HOST, 0))
        busy.listen()
        port = busy.getsockname()[1]
        assert ports.choose({"http": port}, taken=[port + 1])["http"] >= port + 2


def test_a_port_whose_grpc_twin_is_busy_is_passed_over():
    with socket.socket() as busy:
        busy.bind((ports.HOST, 0))
        busy.listen()
        port = busy.getsockname()[1] - ports.GRPC_OFFSET
        assert ports.choose({"s3": port}, with_grpc=True)["s3"] > port


def test_a_port_with_another_users_socket_is_passed_over(monkeypatch, tmp_path):
    """SeaweedFS would wait two minutes for it and then end."""
    (tmp_path / "seaweedfs-master-grpc-31000.sock").touch()
    monkeypatch.setattr(ports, "_SOCKETS", tmp_path)
    owner = (tmp_path / "seaweedfs-master-grpc-31000.sock").stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert ports.choose({"master": 21000}, with_grpc=True)["master"] == 21001
    assert ports.choose({"http": 21000}) == {"http": 21000}
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert ports.choose({"master": 21000}, with_grpc=True)["master"] == 21000


def test_no_two_roles_share_a_port():
    chosen = ports.choose({"a": 21000, "b": 21000, "c": 31000}, with_grpc=True)
    assert len({*chosen.values(), *(port + ports.GRPC_OFFSET for port in chosen.values())}) == 6


def test_a_started_process_is_found_by_number_and_start(home):
    pid, started = run(home, "store", *SLEEP)
    assert processes.find(pid, started).pid == pid
    assert processes.find(pid, started - 60) is None
    assert processes.find(pid, None) is None
    assert os.getsid(pid) == pid  # closing the terminal does not reach it
    assert processes.stop(processes.find(pid, started), processes.mark(home, "store"), grace_s=5)
    assert processes.find(pid, started) is None


def test_a_process_that_ends_by_itself_is_not_taken_for_a_living_one(home):
    pid, started = run(home, "store", sys.executable, "-c", "")
    wait_until(lambda: processes.find(pid, started) is None, "a dead process still counts as living")


def test_stopping_reaches_what_a_killed_leader_left_behind(home):
    script = f"import subprocess; subprocess.Popen({SLEEP!r}).wait()"
    pid, started = run(home, "mlflow", sys.executable, "-c", script)
    leader = processes.find(pid, started)
    wait_until(leader.children, "no child")
    child = leader.children()[0]
    leader.kill()
    wait_until(lambda: processes.find(pid, started) is None, "leader still lives")
    wait_until(lambda: processes.MARK in child.environ(), "child has not begun")
    assert processes.stop(None, processes.mark(home, "mlflow"), grace_s=5)
    assert processes.gone([child], 0)


def test_an_executor_starts_without_what_a_killed_one_left(home):
    left = home / "tmp" / "runner" / "prefect-workspace-attempt-1"
    other = home / "tmp" / "worker-cpu" / "prefect-workspace-attempt-2"
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "workspace.json").write_text("variables of a run, keys among them")
    empty_temporary_folder(home, "runner")
    assert not left.exists()
    assert (left.parent.stat().st_mode & 0o777, list(left.parent.iterdir())) == (0o700, [])
    assert (other / "workspace.json").is_file()  # another one's, which may be running


def test_what_ignores_sigterm_is_killed(home):
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    pid, started = run(home, "mlflow", sys.executable, "-c", script)
    wait_until((home / "log").read_text, "not ready")
    assert processes.stop(processes.find(pid, started), processes.mark(home, "mlflow"), grace_s=0.3)
    assert processes.find(pid, started) is None


def test_down_never_touches_a_stranger_with_a_recorded_number(home, stranger):
    """The computer restarted, and somebody else got the number."""
    record = Record(address="http://127.0.0.1:5000", pid=stranger.pid, started=stranger.create_time() - 3600)
    Records().put(home, "mlflow", record)
    assert not status(home)["mlflow"].running
    down(home)
    assert stranger.is_running()
    assert Records.read(home).get("mlflow").pid is None


def test_down_leaves_services_of_other_homes_alone(home, tmp_path):
    other = tmp_path / "home-2"
    other.mkdir()
    pid, started = run(other, "store", *SLEEP)
    down(home)
    assert processes.find(pid, started) is not None
    assert processes.stop(None, processes.mark(other, "store"), grace_s=5)


def test_down_stops_what_was_started_but_never_recorded(home):
    """`up` was killed between starting a process and writing it down."""
    pid, started = run(home, "prefect", *SLEEP)
    down(home)
    assert processes.find(pid, started) is None


def test_down_stops_what_runs_whatever_is_wrong_with_the_settings(home, monkeypatch):
    pid, started = run(home, "store", *SLEEP)
    (home / "credentials.json").write_text(json.dumps({"s3_access_key": "x", "s3_secret_key": "y"}))
    (home / "credentials.json").chmod(0o644)
    record = Record(address="http://127.0.0.1:8333", ports={"s3": 8333}, pid=pid, started=started)
    Records().put(home, "store", record)
    with pytest.raises(HydraoptError, match="can be read by others"):
        status(home)
    states = down(home)
    assert not any(service.running for service in states.services)
    assert processes.find(pid, started) is None
    monkeypatch.setenv("HYDRAOPT_HOME", str(home))
    assert home_folder() == home.absolute()


def test_leftover_files_mean_nothing(home):
    (home / "services.lock").write_text("12345")
    Records().put(
        home, "store", Record(address="http://127.0.0.1:8333", ports={"s3": 8333}, pid=2**22, started=1.0)
    )
    states = status(home)
    assert not states["store"].running
    assert "hydraopt up" in states["store"].problem
    down(home)
    assert Records.read(home).get("store").ports == {"s3": 8333}  # the address stays for the next start


def test_nothing_is_made_by_looking(tmp_path):
    for look in (status, down):
        assert [service.running for service in look(tmp_path / "nothing").services] == [False] * 4
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(KeyError):
        status(tmp_path)["database"]


@pytest.mark.parametrize("content", ["", "{", '{"version": 2}', '{"services": {"store": {"pid": "x"}}}'])
def test_a_damaged_record_is_named(home, content):
    (home / "services.json").write_text(content)
    with pytest.raises(HydraoptError, match=r"services\.json is damaged"):
        down(home)


def test_the_record_is_what_settings_read(home):
    Records().put(home, "mlflow", Record(address="http://127.0.0.1:5000", pid=1, started=1.0))
    content = json.loads((home / "services.json").read_text())
    assert content["services"]["mlflow"]["address"] == "http://127.0.0.1:5000"


def test_no_free_port_is_said(monkeypatch):
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(ServiceError, match=r"no free port for http in 5000\.\.5499"):
        ports.choose({"http": 5000})
