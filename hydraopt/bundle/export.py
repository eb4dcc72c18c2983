"""A bundle as ordinary PEFT folders, one per task.

Profile ``peft`` keeps every module at its own rank (``rank_pattern``). Profile ``portable`` follows the rules all
common consumers share: one rank for all modules from 8, 16, 32, ..., alpha equal to it, no patterns, plain suffixes as
targets, both factors for every target in every layer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE
from hydraopt.bundle.chains import chain_rank, pair
from hydraopt.bundle.contents import Bundle, write_folder
from hydraopt.bundle.lora_folder import (
    Folder,
    lora_chains,
    lora_config,
    lora_folder,
    lora_settings,
    lora_tensors,
)
from hydraopt.errors import BundleError

Profile = Literal["peft", "portable"]
_PORTABLE_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export(bundle: Bundle, out: Path, *, task: str | None = None, profile: str = "peft") -> dict[str, Path]:
    """Write PEFT folders that compute what the bundle computes.

    Args:
        bundle: The merged set.
        out: Folder to write ``<task>/`` into.
        task: Only this one.
        profile: ``peft`` or ``portable``.

    Returns:
        The folder of each task.

    Raises:
        BundleError: If there is no such task or profile, or the portable profile cannot hold the task.
    """
    if profile not in get_args(Profile):
        raise BundleError(f"profile={profile!r}: use one of {', '.join(get_args(Profile))}")
    tasks = bundle.task_names if task is None else (task,)
    folders = {}
    for name in tasks:
        folder = _portable(bundle, name) if profile == "portable" else lora_folder(bundle, name)
        files = {
            CONFIG_FILE: (json.dumps(folder.config, indent=2, sort_keys=True) + "\n").encode(),
            TENSOR_FILE: safetensors.torch.save(folder.tensors, metadata={"format": "pt"}),
        }
        folders[name] = write_folder(out / name, files)
    return folders


def _portable(bundle: Bundle, task: str) -> Folder:
    chains = lora_chains(bundle, task)
    if bundle.manifest.tasks[task].settings.get("use_dora"):
        raise BundleError(
            f"task {task!r} is a DoRA, which the portable profile cannot hold (servers refuse it); use 'peft'"
        )
    updated = [module for module in bundle.manifest.modules if module.layer in {"linear", "embedding"}]
    tables = [module.name for module in updated if module.layer == "embedding" and module.name in chains]
    if tables:
        raise BundleError(
            f"task {task!r} updates the embedding table {tables[0]!r}, which the portable profile cannot hold; use the "
            "profile 'peft'"
        )
    if bundle.extras(task):
        raise BundleError(
            f"task {task!r} replaces {', '.join(bundle.manifest.tasks[task].saved_modules)} whole, which the portable "
            "profile cannot hold (servers refuse modules_to_save); use the profile 'peft'"
        )
    widest = max(chain_rank(chain) for chain in chains.values())
    fitting = [rank for rank in _PORTABLE_RANKS if rank >= widest]
    if not fitting:
        raise BundleError(
            f"task {task!r} has a head of rank {widest}; the portable profile ends at {_PORTABLE_RANKS[-1]}"
        )
    rank = fitting[0]
    tensors: dict[str, Tensor] = {}
    targets = [module for module in updated if module.layer == "linear"]
    dtype = next(iter(chains.values()))[0].dtype
    for module in targets:
        d_out, d_in = module.shape
        padded_up, padded_down = torch.zeros(d_out, rank, dtype=dtype), torch.zeros(rank, d_in, dtype=dtype)
        if module.name in chains:
            up, down = pair(chains[module.name])
            padded_up[:, : up.shape[1]] = up
            padded_down[: down.shape[0]] = down
        tensors |= lora_tensors(module.layer, module.name, padded_up, padded_down)
    settings = lora_settings(bundle, task, chains) | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.name.rsplit(".", 1)[-1] for module in targets}),
        "fan_in_fan_out": False,
    }
    return Folder(lora_config(settings), tensors)
