"""Digests that are looked up: only of a file that is the very one that was hashed, whatever its times say."""

from __future__ import annotations

import json
import os
import time
from functools import cached_property
from pathlib import Path

import pytest

import hydraopt
from hydraopt.adapters.known_digests import hashed, known_digest
from hydraopt.adapters.peft_folder import Adapter


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hydraopt" / "digests"


def aged(monkeypatch):
    """Any file of now was written an hour ago."""
    later = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr("hydraopt.adapters.known_digests.time.time_ns", lambda: later)


@pytest.fixture
def folder(workshop, cache, monkeypatch):
    """An adapter that was hashed an hour after it was written."""
    folder = workshop.adapter("a")
    aged(monkeypatch)
    hashed(hydraopt.read_adapter(folder))
    assert len(list(cache.iterdir())) == 1
    return folder


def spoil(cache):
    """Make every remembered digest a wrong one, to see whether it is used."""
    for file in cache.iterdir():
        file.write_text(json.dumps(json.loads(file.read_bytes()) | {"digest": "0" * 64}))


def test_a_file_that_did_not_change_is_not_read(folder, cache):
    adapter = hydraopt.read_adapter(folder)
    assert known_digest(adapter) == adapter.digest
    spoil(cache)
    assert known_digest(hydraopt.read_adapter(folder)) == "0" * 64


def flip(file: Path) -> None:
    """Change a number in place, and set the time of modification back."""
    status = file.stat()
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
        handle.seek(-1, os.SEEK_END)
        handle.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", ["in place", "replaced", "settings"])
def test_any_change_is_noticed(folder, cache, change):
    before, file = hydraopt.read_adapter(folder).digest, folder / "adapter_model.safetensors"
    spoil(cache)
    time.sleep(
        0.02
    )  # a tick of the file system's clock: a file is remembered seconds after its last change only
    if change == "in place":
        flip(file)
    elif change == "replaced":
        other = folder / "other"
        other.write_bytes(file.read_bytes())
        flip(other)
        os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
        other.replace(file)
    else:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    after = hydraopt.read_adapter(folder)
    assert known_digest(after) == after.digest not in {before, "0" * 64}


def test_a_file_just_written_is_not_remembered(workshop, cache):
    adapter = hydraopt.read_adapter(workshop.adapter("a"))
    assert hashed(adapter) == adapter.digest
    assert not cache.exists()


def test_a_digest_of_what_a_file_held_earlier_is_not_remembered(workshop, cache, monkeypatch):
    """It was asked for before the file was replaced."""
    folder = workshop.adapter("a")
    adapter = hydraopt.read_adapter(folder)
    before = adapter.digest
    flip(folder / "adapter_model.safetensors")
    aged(monkeypatch)
    assert hashed(adapter) == before
    after = hydraopt.read_adapter(folder)
    assert known_digest(after) == after.digest != before


def test_a_change_while_a_file_is_hashed_is_noticed_later(workshop, cache, monkeypatch):
    folder = workshop.adapter("a")
    plain = Adapter.digest

    def digest_then_change(adapter):
        found = plain.func(adapter)
        time.sleep(0.02)  # a tick of the file system's clock, as above
        flip(folder / "adapter_model.safetensors")
        return found

    changing = cached_property(digest_then_change)
    changing.__set_name__(Adapter, "digest")
    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "digest", changing)
        aged(patch)
        before = hashed(hydraopt.read_adapter(folder))
    after = hydraopt.read_adapter(folder)
    assert known_digest(after) == after.digest != before


def test_a_merge_that_keeps_tasks_reads_changed_ones_alone(folder, workshop, cache):
    folders = {"a": folder, "b": workshop.adapter("b", seed=1)}
    former = hydraopt.merge(folders, budget=0.9)
    opened = {"a": hydraopt.read_adapter(folder), "b": hydraopt.read_adapter(workshop.adapter("c", seed=2))}
    fresh = hydraopt.merge(opened, keep_shared=former)
    assert "digest" not in vars(opened["a"])
    assert fresh.manifest.adapters["a"] == former.manifest.adapters["a"]
    assert fresh.manifest.adapters["b"] == opened["b"].digest != former.manifest.adapters["b"]


def test_a_wrong_note_gets_into_no_bundle(folder, workshop, cache):
    folders = {"a": folder, "b": workshop.adapter("b", seed=1)}
    former = hydraopt.merge(folders, budget=0.9)
    spoil(cache)
    assert hydraopt.merge(folders, keep_shared=former) is former
    assert hydraopt.merge(folders, budget=0.9).id == former.id


@pytest.mark.parametrize("damage", ["", "[]", '{"of": 3}', '{"digest": 7}', "\x00"])
def test_a_damaged_or_missing_note_costs_only_time(folder, cache, damage):
    adapter = hydraopt.read_adapter(folder)
    for file in cache.iterdir():
        file.write_text(damage)
    assert known_digest(adapter) == adapter.digest
    cache.parent.rename(cache.parent.with_name("gone"))
    cache.parent.write_text("not a folder")
    assert known_digest(hydraopt.read_adapter(folder)) == adapter.digest
