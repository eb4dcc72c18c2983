"""A bundle's files: the bytes are the library's own, kept ones are linked while they are what was read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch

import hydraopt
from hydraopt.bundle import saved_file
from hydraopt.bundle.layout import SHARED_FILE, FileEntry, task_file
from hydraopt.bundle.saved_file import read_saved
from hydraopt.bundle.stored_rows import read_once
from hydraopt.bundle.tensor_bytes import describe, encode
from hydraopt.errors import BundleError
from hydraopt.whole_folder import in_place_of


@pytest.mark.parametrize(
    "tensors",
    [
        {"factors": torch.arange(13, dtype=torch.uint8)},
        {"factors": torch.empty(0, dtype=torch.uint8)},
        {
            "factors": torch.arange(7, dtype=torch.uint8),
            "b.weight": torch.randn(3, 5).bfloat16(),
            "a.weight": torch.randn(2, 3, 1),
            'größe "x"\n': torch.randn(4, dtype=torch.float64),
            "transposed": torch.randn(3, 5).half().mT,
            "none": torch.empty(0, 4),
            "count": torch.tensor(3),
            "flag": torch.tensor([True, False, True]),
        },
    ],
)
def test_parts_are_the_bytes_the_library_writes(tensors):
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    parts = encode(tensors)
    assert b"".join(parts) == safetensors.torch.save(contiguous)
    assert describe(parts).bytes == len(safetensors.torch.save(contiguous))


@pytest.fixture
def kept(workshop, tmp_path):
    """A saved bundle of three tasks, and the merge that keeps all but the first, not saved yet."""
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(3)}
    before = hydraopt.merge(folders, budget=0.9).save(tmp_path / "before")
    return before, hydraopt.merge(folders | {"t0": workshop.adapter("new", seed=9)}, keep_shared=before)


def inodes(folder):
    return {
        name: (folder / name).stat().st_ino for name in (SHARED_FILE, *map(task_file, ("t0", "t1", "t2")))
    }


def test_kept_files_are_links_to_the_same_bytes(kept, tmp_path):
    before, bundle = kept
    after = bundle.save(tmp_path / "after")
    same = {name for name, inode in inodes(after).items() if inode == inodes(before)[name]}
    assert same == {SHARED_FILE, task_file("t1"), task_file("t2")}
    hydraopt.verify(after)
    bundle.save(before)  # in place of the former, too
    assert hydraopt.verify(before).id == bundle.id


@pytest.mark.parametrize("change", ["in place", "replaced", "removed"])
def test_a_file_that_is_no_longer_the_one_that_was_read_is_not_linked(kept, tmp_path, change):
    before, bundle = kept
    file = before / task_file("t1")
    if change == "in place":
        file.write_bytes(b"x" * file.stat().st_size)
    else:
        file.unlink()
        if change == "replaced":
            file.write_bytes(b"something else")
    after = bundle.save(tmp_path / "after")
    assert hydraopt.verify(after).id == bundle.id
    assert not file.exists() or file.stat().st_ino != inodes(after)[task_file("t1")]


def test_bytes_changed_behind_a_link_are_refused_in_both_bundles(kept, tmp_path):
    before, bundle = kept
    after = bundle.save(tmp_path / "after")
    file = before / task_file("t1")
    file.write_bytes(b"x" * file.stat().st_size)
    for folder in (before, after):
        with pytest.raises(BundleError, match="SHA-256"):
            hydraopt.Bundle.load(folder)


def test_a_file_replaced_between_its_digest_and_its_header_is_refused(kept, monkeypatch):
    before, _ = kept
    plain, file = saved_file.TensorFile, before / task_file("t1")

    def replaced(path, error):
        if path == file:
            file.unlink()
            safetensors.torch.save_file({"other": torch.ones(3)}, file)
        return plain(path, error)

    monkeypatch.setattr(saved_file, "TensorFile", replaced)
    with pytest.raises(BundleError, match=r"t1\.safetensors: the file was changed while it was read"):
        hydraopt.Bundle.load(before)


def test_a_tensor_that_begins_between_two_numbers_is_read(tmp_path):
    """The format allows it where tensors of one byte a number come first."""
    numbers = torch.randn(5, generator=torch.Generator().manual_seed(0))
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [5], "data_offsets": [1, 21]},
    }
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    data = len(text).to_bytes(8, "little") + text + b"\7" + numbers.numpy().tobytes()
    (tmp_path / "file").write_bytes(data)
    entry = FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    tensors, _ = read_saved(tmp_path / "file", entry, torch.empty(len(data), dtype=torch.uint8))
    assert tensors["a"].tolist() == [7]
    assert torch.equal(tensors["b"], numbers)


KILLED = """
import os, signal, sys
import hydraopt
from pathlib import Path

rename = Path.rename

def killed(self, target):
    if sys.argv[3] == self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    found = rename(self, target)
    if sys.argv[3] == "after" and self.name == "new":
        os.kill(os.getpid(), signal.SIGKILL)
    return found

Path.rename = killed
bundle = hydraopt.Bundle.load(sys.argv[1])
if sys.argv[3] == "writing":
    type(bundle.contents).write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bundle.save(sys.argv[2])
"""


@pytest.mark.parametrize("moment", ["writing", "out", "new"])
def test_what_a_killed_save_left_goes_with_the_next(kept, tmp_path, moment):
    """Killed while it writes, before the old folder goes, or between that and the new one's coming."""
    before, bundle = kept
    out = tmp_path / "place" / "out"
    bundle.save(out)
    died = subprocess.run([sys.executable, "-c", KILLED, before, out, moment], check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert len(list(out.parent.glob(".out.*"))) == 1
    assert out.exists() == (moment != "new")
    bundle.save(out.with_name("ou"))  # neighbours', which are not looked at
    bundle.save(out.with_name("out.new"))
    assert len(list(out.parent.glob(".out.*"))) == 1
    with contextlib.suppress(RuntimeError), in_place_of(out):
        assert hydraopt.verify(out).id == bundle.id  # what was there is there again
        raise RuntimeError
    assert sorted(path.name for path in out.parent.iterdir()) == ["ou", "out", "out.new"]


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError])
def test_the_old_folder_comes_back_where_the_new_one_cannot_come(kept, tmp_path, monkeypatch, reason):
    before, bundle = kept
    out = tmp_path / "place" / "out"
    bundle.save(out)
    rename = pathlib.Path.rename

    def stopped(self, target):
        if self.name == "new":
            raise reason
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", stopped)
    with pytest.raises(reason):
        hydraopt.Bundle.load(before).save(out)
    assert hydraopt.verify(out).id == bundle.id
    assert list(out.parent.iterdir()) == [out]


def test_what_was_replaced_and_then_removed_does_not_come_back(kept, tmp_path):
    """Killed when the new one had come already, before the old one was cleared up."""
    before, bundle = kept
    out = bundle.save(tmp_path / "place" / "out")
    died = subprocess.run([sys.executable, "-c", KILLED, before, out, "after"], check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    assert hydraopt.verify(out).id == hydraopt.Bundle.load(before).id
    shutil.rmtree(out)
    with contextlib.suppress(RuntimeError), in_place_of(out):
        raise RuntimeError
    assert not list(out.parent.iterdir())


def test_what_another_process_is_writing_stays(kept, tmp_path):
    _, bundle = kept
    with in_place_of(tmp_path / "out") as theirs:
        (theirs / "file").write_text("text")
        bundle.save(tmp_path / "out")
        assert (theirs / "file").exists()
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "file").exists()


def test_what_tasks_share_can_be_read_once_for_all(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True) for i in range(4)}
    for heads in (None, 2):  # heads of groups lie in the shared file, too
        bundle = hydraopt.merge(folders, budget=0.9, method="paper", heads=heads)
        read = read_once()
        together = {task: bundle.factors(task, read) for task in folders}
        for task, chains in together.items():
            for name, chain in bundle.factors(task).items():
                assert all(map(torch.equal, chain, chains[name]))
                assert chains[name][-1] is together["t0"][name][-1]
