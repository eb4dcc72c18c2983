"""Receive MLflow's webhooks: an adapter taken into the set or out of it by hand starts a reconcile at once.

Where HYDRAOPT_WEBHOOK_PORT and HYDRAOPT_WEBHOOK_SECRET are set, what executes the flows listens on that port of
loopback. A delivery counts only if it carries MLflow's HMAC of its id, time and body under the secret, is fresh,
and is about the alias ``serving`` of an adapter. It is passed on as the event that our own registrations send, a
hint like that one: nothing in it is believed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Protocol

from hydraopt.errors import RecordError, ServiceError
from hydraopt.json_text import parse_object
from infra.adapter_registry import SERVING, AdapterRegistry
from infra.change_events import set_changed
from infra.mlflow_access import client, every, told_plainly
from infra.settings import Settings

HOST = "127.0.0.1"
FRESH_S = 300
"""Older or later deliveries are refused: somebody may have recorded them."""

_NAME = "hydraopt"
_EVENTS = ("model_version_alias.created", "model_version_alias.deleted")
_LARGEST_BODY = 64 * 1024
_TIMEOUT_S = 10.0
_LOG = logging.getLogger("hydraopt.webhook")


class Headers(Protocol):
    """A request's headers."""

    def get(self, name: str, default: str, /) -> Any:
        """The value of a header."""


class Refused(NamedTuple):
    """Why a delivery does not count, and the status that says so."""

    status: int
    reason: str


class Change(NamedTuple):
    """An alias of an adapter that was set or taken away."""

    model: str
    action: str


def check_signature(
    secret: str, headers: Headers, body: bytes, *, now: float | None = None
) -> Refused | None:
    """Whether a delivery is MLflow's own and fresh; None if it is.

    Args:
        secret: What MLflow was given when the webhook was made.
        headers: The request's.
        body: The request's, as it came.
        now: Seconds since 1970; None reads the clock.
    """
    delivery, sent = headers.get("X-MLflow-Delivery-Id", ""), headers.get("X-MLflow-Timestamp", "")
    signed = f"{delivery}.{sent}.".encode() + body
    wanted = base64.b64encode(hmac.new(secret.encode(), signed, hashlib.sha256).digest()).decode()
    given = headers.get("X-MLflow-Signature", "")
    if not hmac.compare_digest(f"v1,{wanted}".encode(), given.encode()):
        return Refused(401, "the signature is missing or wrong")
    now = time.time() if now is None else now
    if not sent.isdecimal() or abs(now - int(sent)) > FRESH_S:
        return Refused(401, f"the delivery was not sent within the last {FRESH_S} seconds")
    return None


def read_change(body: bytes) -> Change | Refused | None:
    """What a signed delivery tells: a change of an adapter set, nothing of interest (None), or nonsense."""
    try:
        content = parse_object(body, "a delivery", RecordError)
        entity, action, data = content["entity"], content["action"], content["data"]
        if entity != "model_version_alias" or data["alias"] != SERVING:
            return None
        return Change(str(data["name"]), str(action))
    except (RecordError, KeyError, TypeError):
        return Refused(400, "the body is not what MLflow sends")


class Receiver:
    """Decides about deliveries and passes on what they tell.

    Args:
        secret: The shared secret.
        registry: Says whose adapter a model is.
        send: Passes an event on; raises ServiceError if it cannot.
    """

    def __init__(
        self, secret: str, registry: AdapterRegistry, send: Callable[[dict[str, Any]], None]
    ) -> None:
        self._secret = secret
        self._registry = registry
        self._send = send
        self._done: dict[str, float] = {}
        self._lock = threading.Lock()

    def receive(self, headers: Headers, body: bytes) -> Refused | None:
        """Take one delivery. A repeated one is accepted and does nothing; one that failed may come again."""
        refused = check_signature(self._secret, headers, body)
        if refused is not None:
            return refused
        change = read_change(body)
        if change is None or isinstance(change, Refused):
            return change
        delivery = headers.get("X-MLflow-Delivery-Id", "")
        if self._is_done(delivery):
            return None
        try:
            owner = self._registry.owner(change.model)
            if owner is not None:
                self._send(set_changed(*owner, f"alias {SERVING} {change.action}"))
        except ServiceError as error:
            return Refused(503, str(error))
        with self._lock:
            self._done[delivery] = time.monotonic()
        return None

    def _is_done(self, delivery: str) -> bool:
        with self._lock:
            cut = time.monotonic() - 2 * FRESH_S  # what is older would not be fresh
            self._done = {one: when for one, when in self._done.items() if when > cut}
            return delivery in self._done


def send_event(settings: Settings, event: dict[str, Any]) -> None:
    """Give Prefect an event.

    Raises:
        ServiceError: If it does not take it.
    """
    address = f"{settings.prefect_api_url}/events"
    whole = {"id": str(uuid.uuid4()), "occurred": datetime.now(UTC).isoformat(), **event}
    request = urllib.request.Request(  # noqa: S310 - the address is checked to be http(s)
        address, json.dumps([whole]).encode(), {"Content-Type": "application/json"}
    )
    if settings.prefect_auth is not None:
        login = base64.b64encode(settings.prefect_auth.get_secret_value().encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):  # noqa: S310
            return
    except (OSError, urllib.error.HTTPError) as error:
        raise ServiceError(f"Prefect at {address} did not take the event ({error})") from None


def serve(receiver: Receiver, port: int) -> ThreadingHTTPServer:
    """A server on loopback that hands deliveries to ``receiver``; the caller runs and closes it."""

    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > _LARGEST_BODY:
                self._answer(Refused(413, f"a body of at most {_LARGEST_BODY} bytes is wanted"))
                return
            self._answer(receiver.receive(self.headers, self.rfile.read(int(length))))

        def do_GET(self) -> None:
            self._answer(None)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the standard library's name
            _LOG.info(format, *args)

        def _answer(self, refused: Refused | None) -> None:
            text = b"" if refused is None else refused.reason.encode() + b"\n"
            if refused is not None:
                _LOG.warning("%s: %s", refused.status, refused.reason)
            self.send_response(204 if refused is None else refused.status)
            if text:
                self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    return ThreadingHTTPServer((HOST, port), Handler)


def listen(settings: Settings) -> ThreadingHTTPServer | None:
    """Receive webhooks in a thread of this process, and have MLflow send them; None if that is not configured.

    Raises:
        ServiceError: If the port is taken, or MLflow does not take the webhook.
    """
    if settings.webhook_secret is None or settings.webhook_port is None:
        return None
    secret = settings.webhook_secret.get_secret_value()
    receiver = Receiver(secret, AdapterRegistry(settings), lambda event: send_event(settings, event))
    try:
        server = serve(receiver, settings.webhook_port)
    except OSError as error:
        raise ServiceError(
            f"port {settings.webhook_port} for MLflow's webhooks cannot be used ({error.strerror}): "
            "set another HYDRAOPT_WEBHOOK_PORT"
        ) from None
    threading.Thread(target=server.serve_forever, name="webhooks", daemon=True).start()
    _subscribe(settings, f"http://{HOST}:{settings.webhook_port}/", secret)
    return server


def _subscribe(settings: Settings, address: str, secret: str) -> None:
    """Have one webhook of ours in MLflow, with this address and secret."""
    registry = client(settings)
    with told_plainly(settings, "subscribing to its webhooks"):
        ours = [
            one
            for one in every(lambda size, token: registry.list_webhooks(min(size, 100), token))
            if one.name == _NAME
        ]
        if ours:
            registry.update_webhook(ours[0].webhook_id, url=address, events=list(_EVENTS), secret=secret)
        else:
            registry.create_webhook(_NAME, address, list(_EVENTS), secret=secret)
    _LOG.info("MLflow's webhooks are received at %s", address)
