"""A bundle as ordinary PEFT folders, one per task.

Profile ``peft`` writes a task as the kind it was, every module at its own rank. The other profiles write the plain LoRA
that servers read; see :mod:`hydraopt.bundle.profiles`.
"""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch

from hydraopt.adapters.kinds import PROMPT_KINDS
from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.lora_folder import Folder, lora_folder
from hydraopt.bundle.profiles import find_server
from hydraopt.bundle.prompt_folder import prompt_folder
from hydraopt.bundle.server_folder import server_folder
from hydraopt.bundle.vera_folder import vera_folder
from hydraopt.bundle.whole_folder import write_folder


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
        BundleError: If there is no such task or profile, or the profile cannot hold a task.
    """
    server = find_server(profile)
    folders = {}
    for name in bundle.task_names if task is None else (task,):
        bundle.factors(name)  # an unknown task is named before anything is written
        folder = _own_kind(bundle, name) if server is None else server_folder(bundle, name, server)
        files = {
            CONFIG_FILE: (json.dumps(folder.config, indent=2, sort_keys=True) + "\n").encode(),
            TENSOR_FILE: safetensors.torch.save(folder.tensors, metadata={"format": "pt"}),
        }
        folders[name] = write_folder(out / name, files)
    return folders


def _own_kind(bundle: Bundle, task: str) -> Folder:
    kind = bundle.manifest.tasks[task].kind
    if kind == "VERA":
        return vera_folder(bundle, task)
    return prompt_folder(bundle, task) if kind in PROMPT_KINDS else lora_folder(bundle, task)
