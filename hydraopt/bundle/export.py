"""A bundle as ordinary PEFT folders, one per task.

Profile ``peft`` writes a task as the kind it was, every module at its own rank. The other profiles write the plain LoRA
that servers read; see :mod:`hydraopt.bundle.profiles`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from hydraopt.adapters.kinds import PROMPT_KINDS
from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.lora_folder import Folder, lora_folder
from hydraopt.bundle.manifest_file import check_outside
from hydraopt.bundle.profiles import Profile, find_server
from hydraopt.bundle.prompt_folder import prompt_folder
from hydraopt.bundle.server_folder import server_folder
from hydraopt.bundle.tensor_bytes import encode
from hydraopt.bundle.vera_folder import vera_folder
from hydraopt.errors import BundleError
from hydraopt.whole_folder import is_vacant, write_folder

_MARK = "hydraopt_bundle"
"""Says in the metadata of an exported file which bundle it is of."""


def export(bundle: Bundle, out: Path, *, task: str | None = None, profile: str = "peft") -> dict[str, Path]:
    """Write PEFT folders that compute what the bundle computes.

    Args:
        bundle: The merged set.
        out: Folder to write ``<task>/`` into.
        task: Only this one.
        profile: One of :data:`hydraopt.bundle.profiles.PROFILES`.

    Returns:
        The folder of each task.

    Raises:
        BundleError: If there is no such task or profile, the profile cannot hold a task, or a task's folder exists and
            is no earlier export.
    """
    server = find_server(profile)
    names = bundle.task_names if task is None else (task,)
    check_outside(out / names[0])
    for name in names:
        bundle.factors(name)  # an unknown task is named before anything is written
        _check_replaceable(out / name)
    was_there = out.exists()
    try:
        return {name: _write(bundle, name, out / name, server) for name in names}
    except BaseException:
        if not was_there:
            with suppress(OSError):  # it holds the tasks that were written before
                out.rmdir()
        raise


def _write(bundle: Bundle, name: str, place: Path, server: Profile | None) -> Path:
    folder = _own_kind(bundle, name) if server is None else server_folder(bundle, name, server)
    files = {
        CONFIG_FILE: (json.dumps(folder.config, indent=2, sort_keys=True) + "\n").encode(),
        TENSOR_FILE: b"".join(encode(folder.tensors, {"format": "pt", _MARK: bundle.id})),
    }
    return write_folder(place, files)


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over anything but an earlier export: it may be the adapter that the task was made from."""
    if is_vacant(folder):
        return
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - {CONFIG_FILE, TENSOR_FILE}:
        raise BundleError(f"{folder}: exists and holds something else; choose another place")
    try:
        with safe_open(folder / TENSOR_FILE, framework="pt") as file:
            is_ours = _MARK in (file.metadata() or {})
    except (OSError, SafetensorError):
        is_ours = False
    if not is_ours:
        raise BundleError(
            f"{folder}: exists and was not exported from a bundle: it may be an adapter that was trained; choose "
            "another place"
        )


def _own_kind(bundle: Bundle, task: str) -> Folder:
    kind = bundle.manifest.tasks[task].kind
    if kind == "VERA":
        return vera_folder(bundle, task)
    return prompt_folder(bundle, task) if kind in PROMPT_KINDS else lora_folder(bundle, task)
