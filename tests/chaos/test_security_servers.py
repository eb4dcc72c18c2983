"""Who may do what on running servers, what becomes of what was changed behind them, and where no secret is.

All on the production profile, through the commands: their exit codes and messages are what a release manager sees.

Not here: addresses that were signed beforehand and expired, since nothing here hands any out (a device has a key of
its own that only reads); ports, which tests/integration looks at for both profiles (test_local_services.py,
test_production_stack.py), with every role's rights on the store; what is changed in the store, seen from the library
(test_device_pull.py, test_approvals.py, test_supply_chain.py).
"""

from __future__ import annotations

import itertools
import json
import random
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from managers import Manager
from office import Office
from pipeline_home import Result
from production_home import role_variables
from secret_scan import KEY_FILES, Secrets, in_commands, in_files, in_mlflow, in_prefect, in_store, needless
from tiny_adapters import write_bundle

import hydraopt
from infra.approvers import trust
from infra.bundle_registry import model_name
from infra.bundle_store import read_manifest
from infra.channels import live, pointer_key
from infra.mlflow_access import client
from infra.object_store import ObjectStore, StoredObject
from infra.publishing import publish
from infra.records import manifest_key, record_key
from infra.settings import Settings
from infra.signatures import generate_key, load_private_key, public_key_pem
from infra.supply_chain.release_file import parse_description, read_description
from infra.supply_chain.service_key import service_key

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Desk:
    """Alice's two versions of one bundle in the office's store; the second is live, a device holds the first."""

    office: Office
    manager: Manager
    ids: list[str]
    device: Path
    key: Path

    @property
    def store(self) -> ObjectStore:
        return self.manager.store

    @property
    def name(self) -> str:
        return self.manager.name

    def run(self, *words: object) -> Result:
        (result,) = self.office.pipeline.run([*words, "--json"])
        return result

    def pull(self) -> Result:
        return self.run("pull", self.name, "--out", self.device)

    def overwrite(self, key: str, data: bytes) -> None:
        """As somebody with the publisher's key could."""
        self.store._client.put_object(Bucket=self.store.bucket, Key=key, Body=data)


@pytest.fixture(scope="module")
def desk(office, tmp_path_factory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    alice = f"alice-{secrets.token_hex(3)}"
    generate_key(folder / "alice.pem")
    key = load_private_key(folder / "alice.pem")
    trust(office.home, alice, public_key_pem(key))
    manager = Manager(
        office.store(), f"desk-{secrets.token_hex(4)}", alice, key, service_key(office.home),
        lambda seed: write_bundle(folder, seed),
    )  # fmt: skip
    ids = []
    made = Desk(office, manager, ids, folder / "device" / "bundle", folder / "alice.pem")
    for seed in (1, 2):
        ids.append(manager.approved(seed))
        publish(manager.store, manager.name, ids[-1], "stable", manager.trusted)
        if seed == 1:
            assert made.pull().json["bundle_id"] == ids[0]
    return made


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything below ``folder`` but what a refused pull had fetched whole and keeps for the next one."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and ".incoming-" not in str(path)
    }


def listing(store: ObjectStore, *prefixes: str) -> list[StoredObject]:
    return [entry for prefix in prefixes for entry in store.entries(prefix)]


class Case(NamedTuple):
    """What is changed, and how ``pull`` and ``promote`` say so; None: ``pull`` reads nothing of it."""

    key: Callable[[Desk], str]
    pull: str | None
    promote: str
    place: str = "."
    """A regular expression: the byte is one of what it finds."""


def blob(desk: Desk) -> str:
    files = read_manifest(desk.store, desk.name, desk.ids[1]).files()
    return f"blobs/sha256/{files['tasks/b.safetensors'].sha256}"


def document(which: str) -> Callable[[Desk], str]:
    def key(desk: Desk) -> str:
        return getattr(parse_description(read_description(desk.store, desk.name, desk.ids[1])), which).key

    return key


def record(state: str) -> Callable[[Desk], str]:
    return lambda desk: record_key(desk.name, desk.ids[1], state)


NOT_SIGNED = r"not signed by anybody trusted|is damaged"
CHANGED = {
    "blob": Case(blob, "is not what its name promises", r"damaged \(tasks/b\.safetensors\)"),
    "manifest": Case(
        lambda desk: manifest_key(desk.name, desk.ids[1]),
        "is not the manifest its name promises",
        "is not the manifest its name promises",
    ),
    "approval": Case(record("approved"), NOT_SIGNED, NOT_SIGNED, r'(?<="payload":")[^"]+'),
    "signature": Case(record("approved"), NOT_SIGNED, NOT_SIGNED, r'(?<="sig":")[^"]{80}'),
    "channel": Case(lambda desk: pointer_key(desk.name, "stable"), r"stable\.json", r"stable\.json"),
    "version": Case(
        lambda desk: f"bundles/{desk.name}/versions/000002.json",
        r"another bundle than its version's|000002\.json",
        r"another bundle than its version's|000002\.json",
        r'(?<="bundle_id":")[^"]+',
    ),
    "gate report": Case(record("gated"), None, "gate report of bundle .* is gone or was changed|is damaged"),
    "evidence": Case(
        record("evaluated"), None, "measurements behind the gate report .* are gone or were changed|is damaged"
    ),
    "provenance": Case(document("provenance"), "is not what its name promises", "is not what its name promises"),
    "model card": Case(document("bom"), "is not what its name promises", "is not what its name promises"),
    "documents": Case(
        record("described"),
        "was replaced after it was approved|damaged|was changed|missing",
        "was replaced after it was approved|damaged|was changed|missing",
    ),
}  # fmt: skip


def one_bit_of(data: bytes, place: str, chance: random.Random) -> bytes:
    """``data`` with one bit of one byte turned, in what ``place`` finds."""
    found = re.search(place.encode(), data, re.DOTALL) if place != "." else None
    start, end = found.span() if found else (0, len(data))
    at = chance.randrange(start, end)
    return data[:at] + bytes([data[at] ^ (1 << chance.randrange(7))]) + data[at + 1 :]


@pytest.mark.parametrize("what", CHANGED)
def test_one_changed_bit_is_refused_by_name(desk, chance, what):
    """The device keeps what it has, the second channel gets nothing, and after repair both go on."""
    case = CHANGED[what]
    key = case.key(desk)
    before, _ = desk.store.read(key)
    shown = (f"channels/{desk.name}", f"bundles/{desk.name}/versions")
    held, keys = tree(desk.device.parent), [one.key for one in listing(desk.store, *shown)]
    desk.overwrite(key, one_bit_of(before, case.place, chance))
    try:
        pulled = desk.pull() if case.pull else None
        promoted = desk.run("promote", desk.name, "--from", "stable", "--to", "canary")
        checked = desk.run("verify", desk.device)
    finally:
        desk.overwrite(key, before)
    if pulled is not None:
        assert (pulled.code, bool(re.search(case.pull, pulled.json["error"]))) == (2, True), pulled
    assert (promoted.code, bool(re.search(case.promote, promoted.json["error"]))) == (2, True), promoted
    assert (checked.code, hydraopt.verify(desk.device).id) == (0, desk.ids[0])
    assert tree(desk.device.parent) == held
    assert [one.key for one in listing(desk.store, *shown)] == keys


def test_an_approval_of_another_bundle_is_refused(desk):
    key = record_key(desk.name, desk.ids[1], "approved")
    before, _ = desk.store.read(key)
    other, _ = desk.store.read(record_key(desk.name, desk.ids[0], "approved"))
    desk.overwrite(key, other)
    try:
        refused = [desk.pull(), desk.run("promote", desk.name, "--from", "stable", "--to", "canary")]
    finally:
        desk.overwrite(key, before)
    for one in refused:
        assert (one.code, "it was made for something else" in one.json["error"]) == (2, True), one
    assert hydraopt.verify(desk.device).id == desk.ids[0]


BEFORE_OUR_CODE = ("Beginning flow run", "View at")
"""What Prefect logs of a run before it calls our function, which says what the run is about."""


def test_unchanged_it_goes_on_and_every_log_line_names_the_set(desk):
    """What was refused above goes through now; the lines of release, promote and rollback name the adapter set."""
    lines = desk.office.home / "logs" / "flows.jsonl"
    seen = len(lines.read_bytes())
    done = [
        desk.pull(),
        desk.run("promote", desk.name, "--from", "stable", "--to", "canary"),
        desk.run("rollback", desk.name, "--channel", "stable"),
    ]
    assert [one.code for one in done] == [0, 0, 0], done
    assert done[0].json["bundle_id"] == desk.ids[1]
    assert done[2].json["live_bundle_id"] == desk.ids[0]
    said = [json.loads(line) for line in lines.read_bytes()[seen:].splitlines()]
    for flow, bundle_id in (("promote", desk.ids[1]), ("rollback", desk.ids[0])):
        mine = [
            one for one in said if one.get("flow") == flow and not one["message"].startswith(BEFORE_OUR_CODE)
        ]
        assert len(mine) >= 3
        for one in mine:
            assert (one.get("bundle"), one.get("fingerprint")) == (desk.name, "f" * 64), one["message"]
        assert "Finished in state Completed" in mine[-1]["message"]
        assert mine[-1]["bundle_id"] == bundle_id


OURS = ("adapters/", "blobs/", "bundles/", "channels/", "fingerprints/", "records/", "serving/", "trainings/")


def shown_in_mlflow(office: Office, *names: str) -> dict[str, Any]:
    """Versions and aliases of the models of some bundles, and every adapter's."""
    mlflow = client(Settings.load(office.home))
    wanted = {model_name(name) for name in names}
    models = [
        one for one in mlflow.search_registered_models() if one.name in wanted or "adapter." in one.name
    ]
    return {
        one.name: (
            one.aliases,
            sorted(v.version for v in mlflow.search_model_versions(f"name = '{one.name}'")),
        )
        for one in models
    }


def test_the_readers_key_and_a_wrong_key_change_nothing(desk):
    """Whoever has a device's key, and all else that a release manager has, is told no by every command, by name."""
    office, waiting = desk.office, desk.manager.judged(3)[0]
    stray = desk.store.put_blob(b"nothing names this")
    approve = ["approve", waiting, "--as", desk.manager.who, "--key", desk.key]
    reject = ["reject", waiting, "--as", desk.manager.who, "--reason", "no"]
    reader = role_variables(office.home, "reader")
    wrong = {**reader, "HYDRAOPT_S3_SECRET_KEY": "0" * 64}
    commands = {
        "reader": [
            approve,
            reject,
            [
                "ingest",
                office.next_adapter(),
                "--task",
                "topic",
                "--task-file",
                office.pipeline.task("topic"),
            ],
            ["reconcile"],
            ["promote", desk.name, "--from", "stable", "--to", "beta"],
            ["rollback", desk.name],
            ["repair"],
            ["gc", "--delete", "--older-than", "0"],
        ],
        "wrong": [approve, reject, ["pull", desk.name, "--out", desk.device], ["candidates"]],
    }
    stored, shown = listing(desk.store, *OURS), shown_in_mlflow(office, "tiny", desk.name)
    for variables, asked in ((reader, commands["reader"]), (wrong, commands["wrong"])):
        with office.pipeline.start(**variables) as child:
            results = [office.pipeline.ask(child, [*words, "--json"]) for words in asked]
            child.stdin.close()
        for words, result in zip(asked, results, strict=True):
            said = result.json["error"]
            assert (result.code, result.json["kind"]) == (2, "DeniedError"), (words, result)
            assert f"the object store at {reader['HYDRAOPT_S3_ENDPOINT']} refused our key" in said
            assert "HYDRAOPT_S3_ACCESS_KEY" in said
            assert variables["HYDRAOPT_S3_SECRET_KEY"] not in result.stdout + result.stderr
    assert listing(desk.store, *OURS) == stored
    assert shown_in_mlflow(office, "tiny", desk.name) == shown
    desk.store.remove(stray.key)


def test_a_champion_moved_by_hand_moves_no_device_and_is_told(desk):
    """A reconcile by the schedule may be faster than ours, and says it in its own log: then once more."""
    office = desk.office
    mlflow, model = client(Settings.load(office.home)), model_name("tiny")
    right = live(office.store(), "tiny", "stable").bundle_id
    before = mlflow.get_registered_model(model).aliases
    forged = mlflow.create_model_version(
        model, "s3://elsewhere/manifest.json", tags={"bundle_digest": "e" * 64}
    )
    try:
        for _ in range(3):
            mlflow.set_registered_model_alias(model, "champion", forged.version)
            (told,) = office.pipeline.run(["status"])
            status, pulled, mended, after = office.pipeline.good(
                ["status"],
                ["pull", "tiny", "--out", office.pipeline.folder / "follows-tiny"],
                ["reconcile"],
                ["status"],
            )
            if "tiny" in mended["corrected_in_mlflow"]:
                break
    finally:
        mlflow.delete_model_version(model, forged.version)
    assert "an alias was moved by hand" in told.stdout
    assert (status["bundles"]["tiny"]["mlflow_shows"], pulled["bundle_id"]) == ("e" * 64, right)
    assert mended["corrected_in_mlflow"] == {"tiny": "e" * 64}
    assert after["bundles"]["tiny"]["mlflow_shows"] == right
    assert mlflow.get_registered_model(model).aliases == before


def test_no_secret_is_anywhere_but_where_it_belongs(desk):
    """Last of all here: a whole pipeline ran, servers were killed, and all that was refused was logged, too."""
    home = desk.office.home
    secrets_of_home, settings = Secrets(home), Settings.load(home)
    for name in KEY_FILES:
        assert (home / name).stat().st_mode & 0o777 == 0o600, name
    seen, found = [], []
    for where, text in itertools.chain(
        in_files(home), in_store(desk.store), in_prefect(home), in_mlflow(settings), in_commands(home)
    ):
        seen.append(where)
        found += [(where, name) for name in secrets_of_home.within(text)]
    assert found == []
    assert secrets_of_home.within((home / "credentials.json").read_bytes()), "it would find nothing anywhere"
    for kind in (
        "logs/flows.jsonl",
        "Prefect's logs",
        "MLflow's run",
        "object records/",
        "postgres/data/base",
    ):
        assert any(where.startswith(kind) for where in seen), kind
    assert list(needless(home, secrets_of_home)) == []
