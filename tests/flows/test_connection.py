"""Servers that do not answer are named, with the way out."""

import socket

import pytest

pytest.importorskip("prefect")

import httpx

from flows.connection import connect, running_flows
from hydraopt.errors import ServiceError
from infra.settings import Settings

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def variables(monkeypatch, tmp_path):
    """All three servers at an address that accepts connections, in an environment of their own."""
    listener = socket.create_server(("127.0.0.1", 0))
    here = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setattr("os.environ", {"PATH": "/bin"})
    values = {"HOME": str(tmp_path), "S3_ENDPOINT": here, "MLFLOW_URI": here, "PREFECT_API_URL": here}
    for name, value in values.items():
        monkeypatch.setenv(f"HYDRAOPT_{name}", value)
    yield monkeypatch
    listener.close()


@pytest.mark.parametrize("name", ["S3_ENDPOINT", "MLFLOW_URI", "PREFECT_API_URL"])
def test_the_one_that_does_not_answer_is_named(variables, name):
    variables.setenv(f"HYDRAOPT_{name}", NOWHERE)
    with pytest.raises(ServiceError, match=NOWHERE):
        connect()


def test_a_registry_without_a_server_is_not_knocked_at(variables):
    variables.setenv("HYDRAOPT_MLFLOW_URI", "sqlite:////tmp/registry.db")
    assert connect().mlflow_uri == "sqlite:////tmp/registry.db"


def test_services_that_never_ran_say_how_to_start_them(variables):
    variables.delenv("HYDRAOPT_MLFLOW_URI")
    with pytest.raises(ServiceError, match="hydraopt up"):
        connect()


def test_prefect_lost_half_way_is_a_service_error(variables):
    settings = Settings.load()
    with pytest.raises(ServiceError, match="stopped answering"), running_flows(settings):
        raise httpx.ConnectError("[Errno 111] Connection refused")
