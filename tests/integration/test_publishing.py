"""Publishing happens once, whoever does it how often and whatever kills them. On a real store."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import hydraopt
from hydraopt.errors import RecordError, RefusedError
from infra.blobs import BlobRef
from infra.bundle_store import read_manifest
from infra.candidates import list_candidates
from infra.channels import Move, live, log_key, move, pointer_key, settle
from infra.channels import pointer as shown_by_pointer
from infra.publishing import publish, read_version, rollback, rollback_target
from infra.records import canonical, record_key
from infra.signatures import generate_key

pytestmark = pytest.mark.integration

CHILD = Path(__file__).parents[1] / "support" / "publishing_child.py"


def publish_on(manager, bundle_id, channel="stable"):
    return publish(manager.store, manager.name, bundle_id, channel, manager.trusted)


def back(manager, to=None):
    return rollback(manager.store, manager.name, "stable", manager.trusted, to=to)


def numbers(manager):
    return [int(key[-11:-5]) for key in manager.store.keys(f"bundles/{manager.name}/versions/")]


def moves(manager, channel="stable"):
    keys = manager.store.keys(f"channels/{manager.name}/{channel}/log/")
    return [json.loads(manager.store.read(key)[0]) for key in keys]


def test_first_publish_is_version_one_and_live(manager):
    bundle_id = manager.approved(1)
    done = publish_on(manager, bundle_id)
    assert (done.version, done.moved, done.live_bundle_id) == (1, True, bundle_id)
    assert live(manager.store, manager.name, "stable").bundle_id == bundle_id
    assert read_version(manager.store, manager.name, 1).bundle_id == bundle_id
    status = list_candidates(manager.store, manager.name)[0]
    assert (status.state, status.version) == ("published", 1)


def test_publishing_again_changes_nothing(manager):
    bundle_id = manager.approved(1)
    first = publish_on(manager, bundle_id)
    keys = {key: manager.store.read(key) for key in manager.store.keys("") if manager.name in key}
    again = publish_on(manager, bundle_id)
    assert again == first.model_copy(update={"moved": False})
    assert {key: manager.store.read(key) for key in manager.store.keys("") if manager.name in key} == keys


def test_what_is_not_approved_or_not_whole_gets_no_version(manager):
    waiting, approved = manager.judged(1)[0], manager.approved(2)
    with pytest.raises(RefusedError, match="not approved"):
        publish_on(manager, waiting)
    entry = read_manifest(manager.store, manager.name, approved).files()["shared.safetensors"]
    key = f"blobs/sha256/{entry.sha256}"
    content = manager.store.read(key)[0]
    manager.store._client.put_object(Bucket=manager.store.bucket, Key=key, Body=b"!" + content[1:])
    with pytest.raises(RecordError, match=r"shared\.safetensors"):
        publish_on(manager, approved)
    manager.store._client.delete_object(Bucket=manager.store.bucket, Key=key)
    with pytest.raises(RecordError, match=r"shared\.safetensors"):
        publish_on(manager, approved)
    manager.store.create(key, content)  # other tests may have made the same bundle
    assert numbers(manager) == []
    assert live(manager.store, manager.name, "stable") is None


def test_many_publishers_of_many_bundles_give_one_version_each(manager):
    bundles = [manager.approved(seed) for seed in range(4)]
    work = bundles * 6
    random.Random(7).shuffle(work)
    with ThreadPoolExecutor(16) as pool:
        done = list(pool.map(lambda one: publish_on(manager, one), work))
    assert numbers(manager) == [1, 2, 3, 4]
    claimed = {read_version(manager.store, manager.name, number).bundle_id for number in range(1, 5)}
    assert claimed == set(bundles)
    for one in done:
        assert read_version(manager.store, manager.name, one.version).bundle_id == one.bundle_id
    log = moves(manager)
    assert [entry["sequence"] for entry in log] == list(range(1, len(log) + 1))
    assert [entry["version"] for entry in log] == sorted({entry["version"] for entry in log})
    assert live(manager.store, manager.name, "stable").version == 4


def test_rollback_moves_back_and_a_repeated_publish_does_not_undo_it(manager):
    first, second = manager.approved(1), manager.approved(2)
    publish_on(manager, first)
    publish_on(manager, second)
    done = back(manager)
    assert (done.version, done.moved, done.live_bundle_id) == (1, True, first)
    for bundle_id in (second, first):
        again = publish_on(manager, bundle_id)
        assert (again.moved, again.live_version) == (False, 1)
    assert live(manager.store, manager.name, "stable").version == 1
    third = publish_on(manager, manager.approved(3))
    assert (third.version, third.live_version) == (3, 3)
    assert [(one["action"], one["version"]) for one in moves(manager)] == [
        ("publish", 1),
        ("publish", 2),
        ("rollback", 1),
        ("publish", 3),
    ]
    key = record_key(manager.name, second, "rolled-back-stable-000003")
    assert json.loads(manager.store.read(key)[0])["to_version"] == 1


def test_rollback_to_a_named_version_repeats_safely(manager):
    for seed in range(3):
        publish_on(manager, manager.approved(seed))
    assert rollback_target(manager.store, manager.name, "stable") == 2
    assert [back(manager, to=1).moved, back(manager, to=1).moved] == [True, False]
    assert back(manager, to=3).live_version == 3


def test_rollback_needs_a_version_that_was_live_there(manager):
    with pytest.raises(RecordError, match="no former version"):
        back(manager)
    publish_on(manager, manager.approved(1))
    with pytest.raises(RecordError, match="no former version"):
        back(manager)
    publish_on(manager, manager.approved(2), "canary")
    for version in (0, 2, 3, -1):
        with pytest.raises(RecordError, match="never live"):
            back(manager, to=version)


def test_rollback_to_what_was_changed_since_is_refused(manager):
    first, second = manager.approved(1), manager.approved(2)
    publish_on(manager, first)
    publish_on(manager, second)
    manager.store._client.put_object(
        Bucket=manager.store.bucket, Key=record_key(manager.name, first, "gated"), Body=b"{}"
    )
    with pytest.raises(RecordError):
        back(manager)
    assert live(manager.store, manager.name, "stable").bundle_id == second


def test_channels_move_by_themselves(manager):
    first, second = manager.approved(1), manager.approved(2)
    publish_on(manager, first)
    publish_on(manager, second, "canary")
    assert live(manager.store, manager.name, "stable").bundle_id == first
    assert publish_on(manager, second).live_version == 2
    assert numbers(manager) == [1, 2]


def test_move_that_stopped_before_the_pointer_is_finished_by_the_next_one(manager):
    first, second = manager.approved(1), manager.approved(2)
    publish_on(manager, first)
    pointer = manager.store.read(pointer_key(manager.name, "stable"))[0]
    publish_on(manager, second)
    # As if the second publisher had been killed between the log and the pointer.
    manager.store._client.put_object(
        Bucket=manager.store.bucket, Key=pointer_key(manager.name, "stable"), Body=pointer
    )
    assert live(manager.store, manager.name, "stable").version == 2
    assert shown_by_pointer(manager.store, manager.name, "stable").version == 1
    with pytest.raises(RecordError, match=r"moved to version 2 just now.*--to"):
        rollback_target(manager.store, manager.name, "stable")
    assert shown_by_pointer(manager.store, manager.name, "stable").version == 2
    assert settle(manager.store, manager.name, "stable").version == 2
    assert len(moves(manager)) == 2


def test_a_log_that_repeats_a_move_is_damaged(manager):
    """Else whoever follows it would never come to its end."""
    publish_on(manager, manager.approved(1))
    first = manager.store.read(log_key(manager.name, "stable", 1))[0]
    manager.store._client.put_object(
        Bucket=manager.store.bucket, Key=log_key(manager.name, "stable", 2), Body=first
    )
    with pytest.raises(RecordError, match=r"log/000002\.json is about move 1: it was copied or changed"):
        live(manager.store, manager.name, "stable")


def test_rollback_that_stopped_before_the_pointer_goes_back_once(manager):
    for seed in range(3):
        publish_on(manager, manager.approved(seed))
    pointer = manager.store.read(pointer_key(manager.name, "stable"))[0]
    back(manager)
    manager.store._client.put_object(
        Bucket=manager.store.bucket, Key=pointer_key(manager.name, "stable"), Body=pointer
    )
    assert back(manager).live_version == 2  # asked for again
    assert [one["action"] for one in moves(manager)] == ["publish"] * 3 + ["rollback"]
    assert back(manager).live_version == 1


def test_racing_moves_are_made_one_after_the_other(manager):
    first, second = manager.approved(1), manager.approved(2)
    publish_on(manager, first)
    publish_on(manager, second)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda version: back(manager, to=version), [1, 2] * 8))
    log = moves(manager)
    for before, after in itertools.pairwise(log):
        assert after["previous"] == before["version"] != after["version"]
    pointer = json.loads(manager.store.read(pointer_key(manager.name, "stable"))[0])
    assert pointer == log[-1]


def test_lost_answer_to_a_move_does_not_make_it_twice(manager, monkeypatch):
    """boto3 repeats a request whose answer was lost; then our own log entry is in the way."""
    bundle_id = manager.approved(1)
    create = manager.store.create

    def create_and_lose(key, data):
        create(key, data)
        return create(key, data)

    monkeypatch.setattr(manager.store, "create", create_and_lose)
    done = publish_on(manager, bundle_id)
    assert (done.version, done.moved) == (1, True)
    assert len(moves(manager)) == 1


def test_damaged_pointer_and_version_are_told(manager):
    bundle_id = manager.approved(1)
    publish_on(manager, bundle_id)
    for key in (pointer_key(manager.name, "stable"), f"bundles/{manager.name}/versions/000001.json"):
        for damage in (b"", b"[]", b"{}", canonical({"version": 2, "bundle_id": bundle_id}), b"\xff" * 9):
            manager.store._client.put_object(Bucket=manager.store.bucket, Key=key, Body=damage)
            with pytest.raises(RecordError):
                publish_on(manager, bundle_id)


def test_log_entry_is_never_made_twice(manager):
    publish_on(manager, manager.approved(1))
    entry = Move.model_validate(json.loads(manager.store.read(log_key(manager.name, "stable", 1))[0]))
    assert move(manager.store, manager.name, "stable", lambda newest: None) == entry
    assert not manager.store.create(log_key(manager.name, "stable", 1), b"{}")


def start_publishing(manager, running_store, home, folders):
    """A process that uploads, approves and publishes all of ``folders``; it waits for a line before it starts."""
    environment = os.environ | running_store.variables(manager.store.bucket)
    environment |= {
        "HYDRAOPT_HOME": str(home),
        "PYTHONPATH": str(CHILD.parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, str(CHILD), manager.name, str(home / "alice.pem"), *map(str, folders)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_publishers_killed_at_any_point_leave_a_valid_store(manager, running_store, tmp_path):
    """Publishers die at a random request, before it is sent or after the store did it. Then one runs to the end."""
    home, chance = tmp_path / "home", random.Random(11)
    home.mkdir()
    folders = [manager.bundle_folder(seed) for seed in (1, 2)]
    generate_key(home / "alice.pem")
    child = start_publishing(manager, running_store, home, folders)
    outcomes = []
    for _ in range(15):
        child.stdin.write(f"{chance.choice(['sent', 'unsent'])} {chance.randint(1, 90)}\n")
        child.stdin.flush()
        outcomes.append(child.stdout.readline().strip())
        known = {read_version(manager.store, manager.name, one).bundle_id for one in numbers(manager)}
        assert len(known) == len(numbers(manager)) <= 2
    child.stdin.write("never 0\n")
    child.stdin.close()
    assert child.stdout.readline().strip() == "done"
    assert child.wait(30) == 0
    child.stdout.close()

    assert outcomes.count("killed") >= 5
    assert numbers(manager) == [1, 2]
    expected = {hydraopt.Bundle.load(folder).id for folder in folders}
    claimed = [read_version(manager.store, manager.name, one).bundle_id for one in (1, 2)]
    assert set(claimed) == expected
    assert live(manager.store, manager.name, "stable").bundle_id == claimed[-1]
    assert [entry["version"] for entry in moves(manager)] == [1, 2]
    for bundle_id in expected:
        for path, entry in read_manifest(manager.store, manager.name, bundle_id).files().items():
            assert len(manager.store.read_blob(BlobRef(**entry.model_dump()))) == entry.bytes, path
