"""An alias moved by hand in MLflow reaches Prefect as an event: real servers, no flow."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("prefect")

from infra import local_services
from infra.adapter_registry import SERVING, AdapterRegistry, model_name
from infra.adapter_store import AdapterVersion
from infra.change_events import SET_CHANGED
from infra.mlflow_access import client
from infra.mlflow_webhook import listen
from infra.settings import Settings

pytestmark = pytest.mark.integration

PATIENCE_S = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """MLflow and Prefect running, webhooks configured; the store is not needed."""
    for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    for name, value in {
        "S3_ENDPOINT": "http://127.0.0.1:9",
        "S3_ACCESS_KEY": "nobody",
        "S3_SECRET_KEY": "nothing",
        "WEBHOOK_PORT": str(free_port()),
        "WEBHOOK_SECRET": "sixteen-or-more-characters",
    }.items():
        monkeypatch.setenv(f"HYDRAOPT_{name}", value)
    try:
        local_services.up(home, runner=False)
        yield Settings.load(home)
    finally:
        local_services.down(home)


def version(digest: str) -> AdapterVersion:
    return AdapterVersion(
        task="mood", base_model="org/base-7B", digest=digest, files={}, reference_bytes=1, source="test"
    )


def events(settings: Settings, because: str) -> list[dict]:
    """Events of ours that Prefect holds."""
    body = json.dumps({"filter": {"event": {"name": [SET_CHANGED]}}}).encode()
    request = urllib.request.Request(
        f"{settings.prefect_api_url}/events/filter", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        found = json.load(answer)["events"]
    return [event for event in found if event["payload"]["because"] == because]


def wait_for(settings: Settings, because: str, count: int) -> list[dict]:
    end = time.monotonic() + PATIENCE_S
    while len(found := events(settings, because)) < count:
        assert time.monotonic() < end, (Path(settings.home) / "logs" / "mlflow.log").read_text()[-3000:]
        time.sleep(0.5)
    return found


def test_an_alias_moved_by_hand_becomes_an_event_of_its_base_model(settings):
    """Set and deleted. Other aliases and models tell nothing, and a stranger is refused.

    A second start makes no second webhook.
    """
    first = listen(settings)
    first.shutdown()
    first.server_close()
    server = listen(settings)
    registry, mlflow = AdapterRegistry(settings), client(settings)
    assert [one.url for one in mlflow.list_webhooks()] == [f"http://127.0.0.1:{settings.webhook_port}/"]
    for digest in ("a" * 64, "b" * 64):
        registry.register(version(digest), "s3://bucket/adapters/mood.json")
    wait_for(settings, f"alias {SERVING} created", 2)
    name = model_name("org/base-7B", "mood")
    mlflow.set_registered_model_alias(name, "trial", "1")
    mlflow.create_registered_model("somebody-elses")
    mlflow.create_model_version("somebody-elses", "s3://bucket/model/file.json")
    mlflow.set_registered_model_alias("somebody-elses", SERVING, "1")
    mlflow.set_registered_model_alias(name, SERVING, "1")
    event = wait_for(settings, f"alias {SERVING} created", 3)[0]
    assert event["resource"]["prefect.resource.id"] == "hydraopt.base-model.org-base-7b"
    assert event["payload"]["task"] == "mood"

    mlflow.delete_registered_model_alias(name, SERVING)
    wait_for(settings, f"alias {SERVING} deleted", 1)
    assert len(events(settings, f"alias {SERVING} created")) == 3

    body = json.dumps(
        {"entity": "model_version_alias", "action": "created", "data": {"alias": SERVING}}
    ).encode()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{settings.webhook_port}/", body, timeout=10)
    server.shutdown()
    server.server_close()
