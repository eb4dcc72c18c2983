"""Deliveries of MLflow's webhooks: only fresh ones that MLflow signed count, and each once."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("mlflow")

from mlflow.webhooks.delivery import _generate_hmac_signature

from hydraopt.errors import ServiceError
from infra.mlflow_webhook import FRESH_S, Receiver, check_signature, read_change, serve

SECRET = "between-us"
MODEL = "adapter.tests-tiny.mood"


def delivery(*, secret=SECRET, alias="serving", name=MODEL, sent=None, number="one"):
    """Headers and body as MLflow makes them, signed by MLflow's own code."""
    body = json.dumps(
        {
            "entity": "model_version_alias",
            "action": "created",
            "timestamp": "2026-11-25T00:00:00+00:00",
            "data": {"name": name, "alias": alias, "version": "3"},
        }
    )
    stamp = str(int(time.time() if sent is None else sent))
    headers = {
        "X-MLflow-Delivery-Id": number,
        "X-MLflow-Timestamp": stamp,
        "X-MLflow-Signature": _generate_hmac_signature(secret, number, stamp, body),
    }
    return headers, body.encode()


class Registry:
    """Knows one adapter."""

    def owner(self, model):
        return ("tests/tiny", "mood") if model == MODEL else None


def receiver(sent):
    return Receiver(SECRET, Registry(), sent.append)


def test_a_signed_delivery_is_passed_on_once():
    sent = []
    one = receiver(sent)
    headers, body = delivery()
    assert one.receive(headers, body) is None
    assert one.receive(headers, body) is None, "MLflow repeats what it believes lost"
    (event,) = sent
    assert event["resource"]["prefect.resource.id"] == "hydraopt.base-model.tests-tiny"
    assert event["payload"] == {
        "base_model": "tests/tiny",
        "task": "mood",
        "because": "alias serving created",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda headers, body: (headers, body.replace(b"mood", b"doom")),
        lambda headers, body: ({**headers, "X-MLflow-Delivery-Id": "two"}, body),
        lambda headers, body: ({**headers, "X-MLflow-Timestamp": str(int(time.time()) + 1)}, body),
        lambda headers, body: ({**headers, "X-MLflow-Signature": ""}, body),
        lambda headers, body: ({}, body),
        lambda headers, body: delivery(secret="guessed"),
        lambda headers, body: delivery(sent=time.time() - FRESH_S - 5),
        lambda headers, body: delivery(sent=time.time() + FRESH_S + 5),
    ],
    ids=["body", "id", "time", "unsigned", "bare", "other secret", "old", "from the future"],
)
def test_anything_else_is_refused_and_passes_nothing_on(change):
    sent = []
    assert receiver(sent).receive(*change(*delivery())).status == 401
    assert sent == []


@pytest.mark.parametrize(
    "odd", [{"alias": "candidate"}, {"name": "bundle.demo"}, {"name": "adapter.foreign"}]
)
def test_other_aliases_and_models_mean_nothing(odd):
    sent = []
    assert receiver(sent).receive(*delivery(**odd)) is None
    assert sent == []


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"entity": "model_version_alias", "action": "created"}']
)
def test_a_signed_body_that_is_nonsense_is_bad(body):
    assert read_change(body).status == 400


def test_a_delivery_that_could_not_be_passed_on_may_come_again():
    """MLflow tries again after a 503."""
    sent, broken = [], [True]

    def send(event):
        if broken:
            broken.pop()
            raise ServiceError("Prefect is away")
        sent.append(event)

    one = Receiver(SECRET, Registry(), send)
    headers, body = delivery()
    assert one.receive(headers, body).status == 503
    assert one.receive(headers, body) is None
    assert len(sent) == 1


def test_header_names_are_read_in_any_case_over_http():
    """Proxies change it; and a body larger than any webhook is not read."""
    sent = []
    with serve(receiver(sent), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        headers, body = delivery()
        lower = {name.lower(): value for name, value in headers.items()}
        with urllib.request.urlopen(urllib.request.Request(address, body, lower), timeout=10) as answer:
            assert answer.status == 204
        large = urllib.request.Request(address, b"x" * 70_000, headers)
        with pytest.raises(urllib.error.HTTPError, match="413"):
            urllib.request.urlopen(large, timeout=10)
        server.shutdown()
    assert len(sent) == 1


def test_the_signature_of_an_empty_secret_is_not_enough():
    headers, body = delivery(secret="")
    assert check_signature(SECRET, headers, body).status == 401
