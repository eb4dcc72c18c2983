"""What release managers do on running servers: the form in Prefect's pages, repair after a loss, being told."""

from __future__ import annotations

import http.server
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import local_services
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import store_adapter
from infra.approvals import approve
from infra.approvers import SERVICES, approvers_of, trust
from infra.bundle_registry import model_name
from infra.candidates import list_candidates
from infra.channels import live
from infra.mlflow_access import client
from infra.object_store import ObjectStore
from infra.publishing import publish
from infra.serving_record import note_serving
from infra.settings import Settings
from infra.signatures import public_key_pem

pytest.importorskip("prefect")
pytestmark = pytest.mark.integration

CHILD = Path(__file__).parents[1] / "support" / "commands_child.py"
PATIENCE_S = 900


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Running local services."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
            patch.delenv(name)
        folder = tmp_path_factory.mktemp("operations") / "home"
        try:
            local_services.up(folder)
            yield folder
        finally:
            local_services.down(folder)


@pytest.fixture
def office(manager, home):
    """A manager of one bundle on those services, whose key and service are trusted there."""
    mark = secrets.token_hex(4)
    store = ObjectStore(Settings.load(home))
    made = replace(manager, store=store, name=f"ops-{mark}", who=f"alice-{mark}")
    trust(home, made.who, public_key_pem(made.key))
    trust(home, f"pipeline-{mark}", public_key_pem(made.service), SERVICES)
    return made


def describe(home, office, **approval):
    spec = {"name": office.name, "base_model": "tests/tiny", "tasks": ["a", "b"], "approval": approval}
    path = home / "bundles" / f"{office.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(spec))
    return path


def run(home, *command) -> tuple[int, dict[str, Any]]:
    """One command in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HYDRAOPT_")}
    done = subprocess.run(
        [sys.executable, str(CHILD)],
        input=json.dumps([*map(str, command), "--json"]),
        capture_output=True,
        text=True,
        check=True,
        env={**clean, "HYDRAOPT_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    answer = json.loads(done.stdout)
    return answer["code"], json.loads(answer["stdout"])


def ask(home, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to Prefect's API: what its pages send."""
    data = None if body is None else json.dumps(body).encode()
    address = f"{Settings.load(home).prefect_api_url}/{path}"
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > end:  # SQLite is busy, and Prefect says: later
                raise
            time.sleep(1)


def start(home, flow: str, **parameters) -> str:
    deployment = ask(home, f"deployments/name/{flow}/{flow}")["id"]
    return ask(home, f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"]


def wait_for(home, run_id: str, *names: str, question: int | None = None) -> dict[str, Any]:
    """The run, once its state has one of these names (and it asks the ``question``-th time)."""
    end = time.monotonic() + PATIENCE_S
    while True:
        found = ask(home, f"flow_runs/{run_id}")
        key = (found["state"].get("state_details") or {}).get("pause_key") or ""
        if found["state"]["name"] in names and (question is None or key.endswith(f"-{question}")):
            return found
        assert found["state"]["name"] not in {"Failed", "Crashed", "Completed"}, found["state"]
        assert time.monotonic() < end, f"still {found['state']['name']}"
        time.sleep(0.5)


def answer(home, run_id: str, **given) -> str:
    """What Prefect says to a filled-in form."""
    try:
        return ask(home, f"flow_runs/{run_id}/resume", {"run_input": given})["status"]
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"


def test_a_form_in_prefects_pages_approves(home, office):
    """Nothing is taken for a yes that is none, and a wrong name is asked again."""
    describe(home, office, approvers=["bo"], asserted=1)
    bundle_id, _ = office.judged(1)
    form = start(home, "approve-in-ui", bundle=office.name, bundle_id=bundle_id)
    wait_for(home, form, "Suspended", question=1)
    good = {"decision": "approve", "name": "bo", "reason": "looks right"}
    for bad in (
        {},
        {"decision": "approve"},
        good | {"decision": "yes"},
        good | {"name": ""},
        good | {"x": 1},
    ):
        assert answer(home, form, **bad) == "REJECT", bad
    assert answer(home, form, **(good | {"name": "mallory"})) == "ACCEPT"
    wait_for(home, form, "Suspended", question=2)
    assert live(office.store, office.name, "stable") is None
    assert answer(home, form, **good) == "ACCEPT"
    wait_for(home, form, "Completed")
    assert live(office.store, office.name, "stable").bundle_id == bundle_id
    (status,) = list_candidates(office.store, office.name)
    assert (status.state, status.decided_by) == ("published", "bo")


def test_a_form_rejects_with_its_reason(home, office):
    describe(home, office, asserted=1)
    bundle_id, _ = office.judged(1)
    form = start(home, "approve-in-ui", bundle=office.name, bundle_id=bundle_id)
    wait_for(home, form, "Suspended")
    assert answer(home, form, decision="reject", name="bo", reason="too rude") == "ACCEPT"
    wait_for(home, form, "Completed")
    (status,) = list_candidates(office.store, office.name)
    assert (status.state, status.reason) == ("rejected", "too rude")


class _Inbox(http.server.BaseHTTPRequestHandler):
    """Keeps what it is sent in ``server.received``."""

    def do_POST(self):
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_web_hook_is_told_once(home, office, tmp_path):
    """A real server on loopback receives what happened, each thing once; a dead one is named without its URL."""
    describe(home, office, needed=1)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Inbox)
    received = server.received = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = tmp_path / "url.txt"
    url.write_text(f"json://user:hush-{secrets.token_hex(4)}@127.0.0.1:{server.server_address[1]}/")
    code, _ = run(home, "notify", "hook", "--url-file", url)
    assert code == 0
    assert received.pop()["title"] == "hydraopt can tell you things here"

    (home / "notifications.yaml").write_text(
        "tell: [apprise-url/hook]\nevents: [candidate-ready, released]\n"
    )
    try:
        wait_for(home, start(home, "watch"), "Completed")
        released, waiting = office.judged(1)[0], office.judged(2)[0]
        approvers = approvers_of(home, office.name)
        approve(office.store, office.name, released, office.who, office.key, approvers)
        publish(office.store, office.name, released, "stable", approvers)
        wait_for(home, start(home, "watch"), "Completed")
        wait_for(home, start(home, "watch"), "Completed")
        titles = [one["title"] for one in received if office.name in one["title"]]
        assert sorted(titles) == sorted(
            [
                f"{office.name} {waiting[:12]} is ready for approval",
                f"{office.name}, channel stable: version 1 is live",
            ]
        )
        server.shutdown()
        server.server_close()
        code, result = run(home, "notify", "hook", "--url-file", url)
        assert code == 2
        assert "'apprise-url/hook' failed" in result["error"]
        assert "hush" not in result["error"]
        url.write_text("hush://nothing")
        code, result = run(home, "notify", "hook", "--url-file", url)
        assert (code, "no Apprise URL" in result["error"], "hush" in result["error"]) == (2, True, False)
    finally:
        (home / "notifications.yaml").unlink()


def test_repair_brings_back_what_both_databases_showed(home, office, adapter_folder):
    """Both are deleted; what serves, what is live and its scores come back, and a champion moved by hand does not
    move a device."""
    describe(home, office, needed=1)
    settings = Settings.load(home)
    version = store_adapter(office.store, adapter_folder(7), task="a", source="test")
    other = store_adapter(office.store, adapter_folder(8), task="a", source="test")
    note_serving(office.store, version.base_model, "a", version.digest)
    ids = [office.judged(seed)[0] for seed in (1, 2)]
    approvers = approvers_of(home, office.name)
    for bundle_id in ids:
        approve(office.store, office.name, bundle_id, office.who, office.key, approvers)
        publish(office.store, office.name, bundle_id, "stable", approvers)

    local_services.down(home)
    lost = [*home.rglob("mlflow.db*"), *home.rglob("prefect.db*")]
    assert len({path.name.split(".")[0] for path in lost}) == 2, lost
    for path in lost:
        path.unlink()
    local_services.up(home)
    settings = Settings.load(home)
    assert AdapterRegistry(settings).serving() == {}

    for _ in range(2):
        code, repaired = run(home, "repair")
        assert code == 0, repaired
        assert repaired["channels"][office.name] == {"stable": 2}
    assert AdapterRegistry(settings).serving() == {(version.base_model, "a"): version.digest}
    mlflow = client(settings)
    shown = mlflow.get_registered_model(model_name(office.name)).aliases
    assert {alias: int(number) for alias, number in shown.items()} == {
        "candidate": 2,
        "champion": 2,
        "previous": 1,
    }
    scores = mlflow.get_run(mlflow.get_model_version(model_name(office.name), "2").run_id).data.metrics
    assert scores["passed"] == 1.0
    assert other.digest in {
        one.tags["digest"] for one in mlflow.search_model_versions("name LIKE 'adapter.%'")
    }
    artifacts = ask(home, "artifacts/filter", {})
    assert f"gates-{office.name}" in {one["key"] for one in artifacts}

    mlflow.set_registered_model_alias(model_name(office.name), "champion", "1")
    code, pulled = run(home, "pull", office.name, "--out", home / "device")
    assert (code, pulled["bundle_id"], pulled["version"]) == (0, ids[1], 2)
