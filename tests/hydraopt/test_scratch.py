"""Where a bundle's bytes lie: it changes the memory a merge takes, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hydraopt
from hydraopt.bundle import scratch
from hydraopt.bundle.scratch import Scratch


@pytest.fixture
def spilling(monkeypatch):
    """From the first byte on."""
    monkeypatch.setattr(scratch, "SPILL_BYTES", 1)


def resident_bytes(part: torch.Tensor) -> int:
    """Of the mapping that holds a tensor, what is in this process's memory, as the kernel says."""
    address, found = part.data_ptr(), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and ":" not in head:
            begin, end = (int(part, 16) for part in head.split("-"))
            found = begin <= address < end
        elif found and head == "Rss:":
            return 1024 * int(line.split()[1])
    raise AssertionError("no such mapping")


def test_what_is_let_go_takes_no_memory_and_is_still_there(spilling):
    sizes = [3_000_000, 0, 5_000_001]
    room = Scratch(sizes)
    first, none, second = (room.take(size) for size in sizes)
    assert (first.nbytes, none.nbytes, second.nbytes) == tuple(sizes)
    first[:], second[:] = 1, 2
    assert resident_bytes(first) > 7_900_000
    room.let_go(first)
    assert 4_900_000 < resident_bytes(first) < 5_200_000  # one mapping: the second's pages stay
    room.let_go()
    assert resident_bytes(first) == 0
    assert (first == 1).all()
    assert (second == 2).all()
    room.let_go(second[5:7])  # its page, wherever it starts
    room.let_go(torch.zeros(9))  # of others' memory nothing is let go
    assert resident_bytes(second) > 7_900_000


def test_nothing_stays_behind_in_the_temporary_folder(spilling, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = Scratch([1 << 20])
    room.take(1 << 20)[:] = 7
    assert list(tmp_path.iterdir()) == []  # unnamed: a killed process leaves nothing either


@pytest.mark.parametrize("trouble", ["full", "missing", "cannot"])
def test_where_no_file_can_be_had_there_is_memory(spilling, tmp_path, monkeypatch, trouble):
    if trouble == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
    elif trouble == "missing":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    else:
        monkeypatch.delattr("os.posix_fallocate")
    room = Scratch([100])
    part = room.take(100)
    part[:] = 3
    room.let_go()
    assert part.sum() == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_of_any_dtype_is_kept_as_it_is(spilling, dtype):
    tensors = [
        torch.arange(6).reshape(2, 3).to(dtype),
        torch.zeros(0, 4, dtype=dtype),
        torch.ones((), dtype=dtype),
    ]
    room = Scratch(tensor.nbytes for tensor in tensors)
    for tensor in tensors:
        kept = room.keep(tensor)
        assert kept.dtype == dtype
        assert torch.equal(kept, tensor)


def test_bundles_are_the_same_wherever_they_were_made(workshop, tmp_path, monkeypatch):
    """Merged, loaded, changed, saved, verified, exported: byte for byte."""
    head = {"base_model.model.score.weight": torch.randn(3, 16)}
    folders = {
        f"t{seed}": workshop.adapter(
            f"t{seed}", seed=seed, extras=head, task_type="SEQ_CLS", modules_to_save=["score"]
        )
        for seed in range(3)
    }
    changed = folders | {"t1": workshop.adapter("new", seed=9, extras=head, task_type="SEQ_CLS")}
    ids = {}
    for place in ("memory", "file"):
        monkeypatch.setattr(scratch, "SPILL_BYTES", 1 << 40 if place == "memory" else 1)
        hydraopt.merge(folders, budget=0.7).save(tmp_path / place / "a")
        hydraopt.merge(changed, keep_shared=tmp_path / place / "a").save(tmp_path / place / "b")
        hydraopt.Bundle.load(tmp_path / place / "b").save(tmp_path / place / "c")
        hydraopt.Bundle.load(tmp_path / place / "c").export(tmp_path / place / "out")
        ids[place] = [hydraopt.verify(tmp_path / place / name).id for name in "abc"]
    assert ids["memory"] == ids["file"]
    files = {
        place: {
            str(path.relative_to(tmp_path / place)): path.read_bytes()
            for path in sorted((tmp_path / place / "out").rglob("*"))
            if path.is_file()
        }
        for place in ids
    }
    assert len(files["memory"]) == 6
    assert files["memory"] == files["file"]
