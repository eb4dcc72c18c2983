"""A bundle as ordinary PEFT folders, one per task.

Profile ``peft`` keeps every module at its own rank (``rank_pattern``). Profile ``portable`` follows the rules all
common consumers share: one rank for all modules from 8, 16, 32, ..., alpha equal to it, no patterns, plain suffixes as
targets, both factors for every target in every layer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, get_args

import safetensors.torch
import torch
from torch import Tensor

from hydraopt.adapters.lora import PREFIX
from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE
from hydraopt.bundle.contents import Bundle, write_folder
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
        BundleError: If there is no such task or profile, or the portable profile cannot hold the task's extras.
    """
    if profile not in get_args(Profile):
        raise BundleError(f"profile={profile!r}: use one of {', '.join(get_args(Profile))}")
    tasks = bundle.task_names if task is None else (task,)
    folders = {}
    for name in tasks:
        config, tensors = _portable(bundle, name) if profile == "portable" else _peft(bundle, name)
        files = {
            CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
            TENSOR_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        }
        folders[name] = write_folder(out / name, files)
    return folders


def pair(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``(up, down)`` as LoRA wants them; an inner factor is multiplied into the shared rows, in float32."""
    if len(parts) == 2:
        return parts[0], parts[1]
    return parts[0], (parts[1].float() @ parts[2].float()).to(parts[1].dtype)


def nonzero_factors(bundle: Bundle, task: str) -> dict[str, tuple[Tensor, ...]]:
    """The factors of the modules this task changes.

    PEFT cannot hold a rank of 0, nor an adapter without a module: a task that changes nothing keeps one zero
    update of rank 1.
    """
    factors = bundle.factors(task)
    kept = {name: parts for name, parts in factors.items() if parts[0].shape[1] > 0}
    if kept:
        return kept
    module = bundle.manifest.modules[0]
    dtype = bundle.dtype
    up, down = torch.zeros(module.shape[0], 1, dtype=dtype), torch.zeros(1, module.shape[1], dtype=dtype)
    return {module.name: (up, down)}


def lora_settings(bundle: Bundle, task: str, factors: dict[str, tuple[Tensor, ...]]) -> dict[str, Any]:
    """The ``LoraConfig`` fields under which PEFT computes exactly ``up @ down``: alpha equal to the rank everywhere."""
    entry = bundle.manifest.tasks[task]
    ranks = {
        name: parts[-1].shape[0] if len(parts) == 2 else parts[0].shape[1] for name, parts in factors.items()
    }
    usual = Counter(sorted(ranks.values())).most_common(1)[0][0]
    # PEFT reads the keys as regular expressions.
    pattern = {re.escape(name): rank for name, rank in sorted(ranks.items()) if rank != usual}
    return {
        "task_type": entry.task_type,
        "base_model_name_or_path": bundle.manifest.base_model.name,
        "revision": bundle.manifest.base_model.revision,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "target_modules": sorted(factors),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "fan_in_fan_out": entry.fan_in_fan_out,
        "modules_to_save": list(entry.saved_modules) or None,
    }


def _config(settings: dict[str, Any]) -> dict[str, Any]:
    return {"peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False, **settings}


def _peft(bundle: Bundle, task: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    factors = nonzero_factors(bundle, task)
    tensors = {name: tensor.contiguous() for name, tensor in bundle.extras(task).items()}
    for name, parts in factors.items():
        up, down = pair(parts)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = down.contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = up.contiguous()
    return _config(lora_settings(bundle, task, factors)), tensors


def _portable(bundle: Bundle, task: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entry = bundle.manifest.tasks[task]
    if bundle.extras(task):
        raise BundleError(
            f"task {task!r} replaces {', '.join(entry.saved_modules)} whole, which the portable profile cannot hold "
            "(servers refuse modules_to_save); use the profile 'peft'"
        )
    factors = nonzero_factors(bundle, task)
    widest = max(parts[0].shape[1] for parts in factors.values())
    fitting = [rank for rank in _PORTABLE_RANKS if rank >= widest]
    if not fitting:
        raise BundleError(
            f"task {task!r} has a head of rank {widest}; the portable profile ends at {_PORTABLE_RANKS[-1]}"
        )
    rank = fitting[0]
    tensors = {}
    for module in bundle.manifest.modules:
        d_out, d_in = module.shape
        dtype = bundle.dtype
        padded_up, padded_down = torch.zeros(d_out, rank, dtype=dtype), torch.zeros(rank, d_in, dtype=dtype)
        if module.name in factors:
            up, down = pair(factors[module.name])
            padded_up[:, : up.shape[1]] = up
            padded_down[: down.shape[0]] = down
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = padded_down
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = padded_up
    settings = lora_settings(bundle, task, factors) | {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": sorted({module.name.rsplit(".", 1)[-1] for module in bundle.manifest.modules}),
        "fan_in_fan_out": False,
    }
    return _config(settings), tensors
