"""One task of a bundle as a LoRA folder: what LoRA, AdaLoRA and DoRA tasks are written back as."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hydraopt.adapters.module import PREFIX
from hydraopt.bundle.chains import Chain, chain_rank, pair, zero_chain
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.layout import ModuleEntry
from hydraopt.bundle.stored_rows import StoredRows
from hydraopt.errors import BundleError
from hydraopt.finite import all_finite


class Folder(NamedTuple):
    """What a PEFT folder holds."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def lora_chains(
    bundle: Bundle, task: str, read_shared: Callable[[StoredRows], Tensor] = StoredRows.read
) -> dict[str, Chain]:
    """The chains of the modules this task changes, none of rank 0; ``read_shared`` as in :meth:`Bundle.factors`.

    A module of rank 0 is left out, but for DoRA, whose magnitude still acts on it: PEFT cannot hold a rank of 0, so it
    keeps one zero direction. So does a task that changes nothing, as PEFT cannot hold an adapter without a module.

    Raises:
        BundleError: If the task changes nothing and the bundle has no module that it could leave as it is.
    """
    chains = bundle.factors(task, read_shared)
    if not chains:
        module = _any_module(bundle, task)
        return {module.name: zero_chain(module.shape, bundle.dtype)}
    kept = {name: chain for name, chain in chains.items() if chain_rank(chain) > 0}
    keeps_all = bundle.manifest.tasks[task].settings.get("use_dora")
    for name in chains if keeps_all else list(chains)[:1] if not kept else ():
        if name not in kept:
            chain = chains[name]
            kept[name] = zero_chain((chain[0].shape[0], chain[-1].shape[1]), chain[0].dtype)
    return kept


def _any_module(bundle: Bundle, task: str) -> ModuleEntry:
    """A module that tasks of the same kind of model update: one in a group of none keeps no module of its own."""
    kinds = {name: (entry.kind, entry.task_type) for name, entry in bundle.manifest.tasks.items()}
    alike = [name for name, kind in kinds.items() if kind == kinds[task]]
    found = next((module for module in bundle.modules_of(alike) if module.layer == "linear"), None)
    if found is None:
        raise BundleError(
            f"task {task!r} changes nothing, and the bundle has no module of its kind for it to hold; leave it out"
        )
    return found


def chain_ranks(chains: Mapping[str, Chain]) -> dict[str, int]:
    """The rank of each module's update."""
    return {name: chain_rank(chain) for name, chain in chains.items()}


def common_settings(bundle: Bundle, task: str) -> dict[str, Any]:
    """The settings every kind of folder has."""
    entry = bundle.manifest.tasks[task]
    return {
        "task_type": entry.task_type,
        "base_model_name_or_path": bundle.manifest.base_model.name,
        "revision": bundle.manifest.base_model.revision,
        "inference_mode": True,
        "modules_to_save": list(entry.saved_modules) or None,
    }


def lora_settings(bundle: Bundle, task: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The ``LoraConfig`` fields under which PEFT computes exactly ``up @ down``: alpha equal to the rank everywhere.

    Args:
        bundle: The merged set.
        task: One of its tasks.
        ranks: Rows of ``down`` in each module that the task updates.
    """
    entry = bundle.manifest.tasks[task]
    usual, pattern = usual_rank(ranks)
    return common_settings(bundle, task) | {
        "r": usual,
        "lora_alpha": usual,
        "lora_dropout": 0.0,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "fan_in_fan_out": bool(entry.settings.get("fan_in_fan_out")),
        "use_dora": bool(entry.settings.get("use_dora")),
    }


def name_tails(names: Iterable[str]) -> set[str]:
    """What names end with after one of their dots: a module called so is taken for them, too, by PEFT."""
    return {name[dot + 1 :] for name in names for dot in range(len(name)) if name[dot] == "."}


def usual_rank(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The commonest rank of some modules, and the others' as ``rank_pattern``.

    PEFT reads its keys as regular expressions of how names end.
    """
    usual = Counter(sorted(ranks.values())).most_common(1)[0][0]
    tails = name_tails(ranks)
    return usual, {
        ("^" if name in tails else "") + re.escape(name): rank
        for name, rank in sorted(ranks.items())
        if rank != usual
    }


def lora_config(settings: dict[str, Any]) -> dict[str, Any]:
    """``adapter_config.json`` of a LoRA."""
    return {"peft_type": "LORA", "bias": "none", "use_rslora": False, **settings}


def lora_tensors(layer: str, name: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """A module's two tensors under the names PEFT gives them."""
    ending = (
        ("lora_embedding_A", "lora_embedding_B")
        if layer == "embedding"
        else ("lora_A.weight", "lora_B.weight")
    )
    return {
        f"{PREFIX}{name}.{ending[0]}": down.contiguous(),
        f"{PREFIX}{name}.{ending[1]}": up.contiguous(),
    }


def written_as(tensor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The tensor in the dtype of a file.

    Raises:
        BundleError: If that cannot hold its numbers: one becomes infinite, or all of them nothing.
    """
    written = tensor.to(dtype)
    if not all_finite(written) or (not written.any() and bool(tensor.any())):
        raise BundleError(
            f"{where} does not fit the range of {dtype}, in which it would be written; merge with dtype='bfloat16', or "
            "use another profile"
        )
    return written


def layers(bundle: Bundle) -> dict[str, str]:
    """What each module's update is added to, by module."""
    return {module.name: module.layer for module in bundle.manifest.modules}


def lora_folder(bundle: Bundle, task: str) -> Folder:
    """Every module at its own rank, extras (DoRA's magnitudes among them) as they were."""
    chains = lora_chains(bundle, task)
    layer_of = layers(bundle)
    tensors = {name: tensor.contiguous() for name, tensor in bundle.extras(task).items()}
    for name, chain in chains.items():
        where = f"task {task!r}: module {name!r}"
        up, down = (written_as(part, bundle.dtype, where) for part in pair(chain))
        tensors |= lora_tensors(layer_of[name], name, up, down)
    return Folder(lora_config(lora_settings(bundle, task, chain_ranks(chains))), tensors)
