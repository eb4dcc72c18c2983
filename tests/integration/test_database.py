"""PostgreSQL as `up` starts it, killed the hard way."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from hydraopt.errors import ServiceError
from infra.local_services import database, health, ports, processes

psycopg2 = pytest.importorskip("psycopg2", reason="needs the extra `production`")
pytestmark = pytest.mark.integration

PASSWORD = "of-a-test"


@contextlib.contextmanager
def running(folder: Path, port: int):
    """The server on its data, until the block is left; gives the process."""
    value = f"test-postgres@{folder}"
    pid, started = processes.start(
        [database.program("postgres"), "-c", f"port={port}", "-c", "unix_socket_directories="],
        environment={"PGDATA": str(folder / "data"), processes.MARK: value},
        folder=folder,
        log=folder.parent / "postgres.log",
        user=database.run_as(),
    )
    leader = psutil.Process(pid)
    try:
        end = time.monotonic() + 30
        while True:
            try:
                health.check_postgres([database.program("pg_isready"), "--host=127.0.0.1", f"--port={port}"])
                break
            except health.UnhealthyError:
                log = (folder.parent / "postgres.log").read_text()
                assert processes.find(pid, started) is not None, log
                assert time.monotonic() < end, log
                time.sleep(0.1)
        yield leader
    finally:
        processes.stop(leader if leader.is_running() else None, value, grace_s=10, ask=signal.SIGINT)


def test_what_a_killed_server_leaves_does_not_keep_the_next_one_away():
    """A child that does not notice the end of its server holds the memory that the next server asks for."""
    try:
        database.program("postgres")
    except ServiceError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        home = Path(name) / "home"
        home.mkdir()
        folder = home / "postgres"
        database.make_cluster(folder, PASSWORD, database.run_as())
        port = ports.choose({"sql": 15432})["sql"]
        with running(folder, port) as leader:
            login = {"host": "127.0.0.1", "port": port, "user": "postgres", "password": PASSWORD}
            connection = psycopg2.connect(**login, dbname="postgres")
            child = psutil.Process(connection.info.backend_pid)
            child.suspend()
            leader.kill()
        assert not processes.gone([child], 0)
        database.end_orphans(folder)
        assert processes.gone([child], 0)
        with running(folder, port):
            psycopg2.connect(**login, dbname="postgres").close()
