"""Trainer checkpoints that can be told whole from half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hydraopt.atomic_files import sync, write_atomically
from hydraopt.errors import TaskFileError
from hydraopt.file_digest import sha256_of
from hydraopt.json_text import parse_object

_MARKER = "whole.json"


class MarkCheckpoints(TrainerCallback):  # type: ignore[misc]  # untyped library
    """Writes a marker into each checkpoint once all of it is on disk.

    The Trainer writes a checkpoint file by file in its final folder, so a killed run leaves one that looks
    complete by name.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Called by the Trainer after it wrote a checkpoint."""
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        digests = {}
        for file in sorted(checkpoint.iterdir()):
            sync(file)
            digests[file.name] = sha256_of(file)
        write_atomically(checkpoint / _MARKER, json.dumps(digests, sort_keys=True).encode())


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all as they were written; half-written ones are removed."""
    whole = []
    for checkpoint in folder.glob("checkpoint-*"):
        if _is_whole(checkpoint):
            whole.append(checkpoint)
        else:
            shutil.rmtree(checkpoint)
    return max(whole, key=step_of, default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        digests = parse_object((checkpoint / _MARKER).read_bytes(), _MARKER, TaskFileError)
        return all(sha256_of(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, TaskFileError):
        return False


def step_of(checkpoint: Path) -> int:
    """How many optimiser steps a checkpoint has behind it."""
    return int(checkpoint.name.removeprefix("checkpoint-"))
