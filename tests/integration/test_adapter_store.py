"""Adapter versions on a real store."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

import hydraopt
from hydraopt.errors import AdapterFormatError, HydraoptError, RecordError
from infra.adapter_store import (
    fetch_adapter,
    find_training,
    load_adapter_version,
    note_training,
    read_evaluation_rows,
    store_adapter,
)

pytestmark = pytest.mark.integration

ROWS = [{"text": "größer", "label": "a"}, {"text": "line\u2028two\n", "label": "b"}]
KEY = "ab" * 32


@pytest.fixture
def version(object_store, adapter_folder, unique_name):
    return store_adapter(
        object_store, adapter_folder(1), task=unique_name, source="a test", evaluation_rows=ROWS
    )


def test_version_is_found_again_with_all_that_was_said(object_store, version, unique_name):
    found = load_adapter_version(object_store, "tests/tiny", unique_name, version.digest)
    assert found == version
    assert read_evaluation_rows(object_store, found) == ROWS
    assert found.key == f"adapters/tests-tiny/{unique_name}/{version.digest}.json"


def test_fetched_folder_is_the_adapter(object_store, version, tmp_path):
    folder = fetch_adapter(object_store, version, tmp_path / "cache")
    assert hydraopt.read_adapter(folder).digest == version.digest
    assert fetch_adapter(object_store, version, tmp_path / "cache") == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [version.digest]


def test_racing_fetches_share_one_whole_folder(object_store, version, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: fetch_adapter(object_store, version, tmp_path / "cache"), range(8)))
    assert len(folders) == 1
    assert hydraopt.read_adapter(folders.pop()).digest == version.digest
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [version.digest]


@pytest.mark.parametrize("damage", ["byte", "missing", "extra"])
def test_damaged_cache_is_fetched_again(object_store, version, tmp_path, damage):
    folder = fetch_adapter(object_store, version, tmp_path / "cache")
    tensors = folder / "adapter_model.safetensors"
    if damage == "byte":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "missing":
        tensors.unlink()
    else:
        (folder / "adapter_model.bin").write_bytes(b"pickle")
    again = fetch_adapter(object_store, version, tmp_path / "cache")
    assert hydraopt.read_adapter(again).digest == version.digest
    assert {path.name for path in again.iterdir()} == set(version.files)


def test_record_that_names_another_adapters_files_is_refused(object_store, adapter_folder, version, tmp_path):
    other = store_adapter(object_store, adapter_folder(2), task=version.task, source="a test")
    mixed = version.model_copy(update={"files": other.files})
    with pytest.raises(RecordError, match="another adapter"):
        fetch_adapter(object_store, mixed, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_storing_again_adds_what_is_new_and_keeps_the_rest(object_store, adapter_folder, version):
    evaluation = {"value": 0.5}
    again = store_adapter(
        object_store,
        adapter_folder(1),
        task=version.task,
        source="elsewhere",
        own_evaluation=evaluation,
        training_key=KEY,
    )
    assert again == version.model_copy(update={"own_evaluation": evaluation, "training_key": KEY})
    assert load_adapter_version(object_store, "tests/tiny", version.task, version.digest) == again


def test_racing_stores_of_one_adapter_lose_nothing(object_store, adapter_folder, unique_name):
    folder = adapter_folder(3)
    said = [{"own_evaluation": {"value": 1.0}}, {"task_definition": {"name": "x"}}, {"training_key": KEY}, {}]
    with ThreadPoolExecutor(8) as pool:
        versions = list(
            pool.map(
                lambda more: store_adapter(object_store, folder, task=unique_name, source="s", **more),
                said * 2,
            )
        )
    stored = load_adapter_version(object_store, "tests/tiny", unique_name, versions[0].digest)
    assert (stored.own_evaluation, stored.task_definition, stored.training_key) == (
        {"value": 1.0},
        {"name": "x"},
        KEY,
    )


def test_training_leads_to_its_version(object_store, version):
    key = version.digest  # any digest nobody used as a key
    assert find_training(object_store, key) is None
    note_training(object_store, key, version)
    note_training(object_store, key, version)
    assert find_training(object_store, key) == version


def test_unknown_version_is_told(object_store, unique_name):
    with pytest.raises(RecordError, match="has no adapter"):
        load_adapter_version(object_store, "tests/tiny", unique_name, "0" * 64)


def test_folder_without_safetensors_is_no_adapter(object_store, adapter_folder, unique_name, tmp_path):
    folder = shutil.copytree(adapter_folder(4), tmp_path / "copy")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError):
        store_adapter(object_store, folder, task=unique_name, source="a test")
    assert list(object_store.keys(f"adapters/tests-tiny/{unique_name}/")) == []


def test_task_name_cannot_leave_its_place(object_store, adapter_folder):
    with pytest.raises(HydraoptError, match="task name"):
        store_adapter(object_store, adapter_folder(5), task="../../x", source="a test")
