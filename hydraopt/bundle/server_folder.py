"""One task of a bundle as the plain LoRA folder a server reads; see :mod:`hydraopt.bundle.profiles`."""

from __future__ import annotations

import torch
from torch import Tensor

from hydraopt.adapters.kinds import PROMPT_KINDS
from hydraopt.adapters.whole_tensors import copied_module
from hydraopt.bundle.chains import chain_rank, pair
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.lora_folder import (
    Folder,
    chain_ranks,
    layers,
    lora_chains,
    lora_config,
    lora_settings,
    lora_tensors,
    usual_rank,
    written_as,
)
from hydraopt.bundle.profiles import Profile, fitting_rank
from hydraopt.bundle.vera_folder import Shapes, vera_as_lora
from hydraopt.errors import BundleError


def server_folder(bundle: Bundle, task: str, profile: Profile) -> Folder:
    """The task as plain LoRA, in the ranks, targets and dtype of the profile.

    Raises:
        BundleError: If the server could not read the task's kind, whole layers, tables or ranks.
    """
    _check_readable(bundle, task, profile)
    is_vera = bundle.manifest.tasks[task].kind == "VERA"
    shapes = _base_shapes(bundle, task) if is_vera else {}
    chains = vera_as_lora(bundle, task, shapes) if is_vera else lora_chains(bundle, task)
    layer_of = layers(bundle)
    tables = [name for name in chains if layer_of.get(name) == "embedding"]
    if tables and not profile.tables:
        raise BundleError(
            f"task {task!r} updates the embedding table {tables[0]!r}, which the profile {profile.name!r} cannot hold; "
            "use the profile 'peft'"
        )
    pairs = {name: pair(chain) for name, chain in chains.items()}
    if profile.every_layer:
        _complete(bundle, task, pairs, profile, shapes)
    settings = lora_settings(bundle, task, chain_ranks(chains)) | {"use_dora": False, "fan_in_fan_out": False}
    if profile.ranks is None:
        settings |= _own_ranks(pairs)
    else:
        rank = fitting_rank(profile, task, max(chain_rank(chain) for chain in chains.values()))
        pairs = {name: _padded(up, down, rank) for name, (up, down) in pairs.items()}
        settings |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}}
    settings |= {"alpha_pattern": {}, "target_modules": sorted({name.rsplit(".", 1)[-1] for name in pairs})}
    dtype = profile.dtype or bundle.dtype
    tensors: dict[str, Tensor] = {}
    for name, factors in pairs.items():
        where = f"profile {profile.name!r}, task {task!r}: module {name!r}"
        up, down = (written_as(part, dtype, where) for part in factors)
        tensors |= lora_tensors(layer_of.get(name, "linear"), name, up, down)
    return Folder(lora_config(settings), tensors)


def _check_readable(bundle: Bundle, task: str, profile: Profile) -> None:
    entry = bundle.manifest.tasks[task]
    reason = None
    if entry.kind in PROMPT_KINDS:
        reason = f"is a prompt ({entry.kind}), and servers read LoRA only"
    elif entry.settings.get("use_dora"):
        reason = "is a DoRA, whose magnitudes servers refuse"
    elif bundle.extras(task):
        copies = {copied_module(name) for name in bundle.extras(task)} - {None}
        reason = f"replaces {', '.join(entry.saved_modules)} whole, and servers refuse modules_to_save"
        if not entry.saved_modules:
            reason = f"carries a copy of the base model's {', '.join(sorted(map(str, copies)))}, and servers refuse it"
    if reason is not None:
        raise BundleError(
            f"task {task!r} {reason}; the profile {profile.name!r} cannot hold it, use the profile 'peft'"
        )


def _base_shapes(bundle: Bundle, task: str) -> Shapes:
    """Sizes of the linear layers of the task's base model, from its configuration; no weight is read."""
    from hydraopt.base_models import linear_shapes  # noqa: PLC0415 - transformers takes seconds to import

    base = bundle.manifest.base_model
    return linear_shapes(base.name, base.revision, bundle.manifest.tasks[task].task_type)


def _complete(
    bundle: Bundle, task: str, pairs: dict[str, tuple[Tensor, Tensor]], profile: Profile, shapes: Shapes
) -> None:
    """Add zero updates: every linear module of the bundle, and what the profile wants beside the task's targets."""
    wanted = {module.name: module.shape for module in bundle.manifest.modules if module.layer == "linear"}
    needed = _missing_together([*wanted, *pairs], profile)
    if needed:
        shapes = shapes or _base_shapes(bundle, task)
        for name in needed:
            if name not in shapes:
                raise BundleError(
                    f"the profile {profile.name!r} wants {name!r} beside its neighbours, but the base model "
                    f"{bundle.manifest.base_model.name!r} has no such layer; use the profile 'vllm' or 'peft'"
                )
            wanted[name] = shapes[name]
    targets = {name.rsplit(".", 1)[-1] for name in pairs}
    if shapes:  # a VeRA task: its targets in every layer of the base
        wanted |= {name: shape for name, shape in shapes.items() if name.rsplit(".", 1)[-1] in targets}
    dtype = next(iter(pairs.values()))[0].dtype
    for name, (d_out, d_in) in wanted.items():
        if name not in pairs:
            pairs[name] = torch.zeros(d_out, 0, dtype=dtype), torch.zeros(0, d_in, dtype=dtype)


def _missing_together(names: list[str], profile: Profile) -> list[str]:
    """Modules that the profile wants because a neighbour is updated."""
    missing: set[str] = set()
    for group in profile.together:
        for name in names:
            parent, _, leaf = name.rpartition(".")
            if leaf in group:
                missing |= {f"{parent}.{other}" for other in group}
    return sorted(missing - set(names))


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors at ``rank``, with zeros."""
    padded_up, padded_down = up.new_zeros(up.shape[0], rank), down.new_zeros(rank, down.shape[1])
    padded_up[:, : up.shape[1]] = up
    padded_down[: down.shape[0]] = down
    return padded_up, padded_down


def _own_ranks(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, object]:
    """Settings for a rank per module under one alpha: ``alpha / rank`` is then taken back from B, in place.

    The scale is alpha over the rank of the tensor; alpha is the commonest rank, so most of B stays as it is.
    """
    ranks = {name: down.shape[0] for name, (_, down) in pairs.items()}
    usual, pattern = usual_rank(ranks)
    for name, (up, down) in pairs.items():
        pairs[name] = (up.float() * (ranks[name] / usual)).to(up.dtype), down
    return {"r": usual, "lora_alpha": usual, "rank_pattern": pattern}
