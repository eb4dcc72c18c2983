"""Tensors an adapter carries as they are: layers it replaces whole, and copies of base weights PEFT saves along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydraopt.adapters.module import PREFIX, AdapterModule, Source

_BASE_COPY = ".base_layer."
MAGNITUDE = ".lora_magnitude_vector"
"""How the name of DoRA's magnitude vector ends."""


def saved_modules(config: Mapping[str, Any]) -> set[str]:
    """Names of the layers the adapter replaces whole (``modules_to_save``)."""
    saved = set(config.get("modules_to_save") or ())
    if config.get("task_type") in {"SEQ_CLS", "TOKEN_CLS"}:
        saved |= {"classifier", "score"}  # PEFT adds them by itself for these task types
    return saved


def is_saved(tensor: str, name: str) -> bool:
    """Whether ``modules_to_save`` means this tensor by ``name``: PEFT's rule is that a module's path ends in it."""
    path = tensor.removeprefix("base_model.").removeprefix("model.").split(".")[:-1]
    return any(".".join(path[:end]).endswith(name) for end in range(1, len(path) + 1))


def copied_module(tensor: str) -> str | None:
    """The module whose base weight (or bias) this tensor is a copy of, or None.

    PEFT writes such copies when an adapter targets ``embed_tokens`` or ``lm_head``.
    """
    module, found, leaf = tensor.removeprefix(PREFIX).partition(_BASE_COPY)
    return module if found and leaf in {"weight", "bias"} else None


def by_tying(source: Source) -> str:
    """What to add to a message about tensors nobody asked for, where PEFT's tying of weights may have made them."""
    is_tied = source.config.get("ensure_weight_tying")
    return "; ensure_weight_tying adds it, which is not supported" if is_tied else ""


def whole_tensors(
    source: Source, modules: Mapping[str, AdapterModule], used: set[str], prefix: str = PREFIX
) -> list[str]:
    """The tensors of a folder that are carried as they are.

    Args:
        source: The folder.
        modules: Its modules.
        used: Tensors its kind has already accounted for.
        prefix: How PEFT starts the names.

    Raises:
        AdapterFormatError: If a tensor is neither used nor a whole layer nor a copy of a targeted base weight.
    """
    saved = saved_modules(source.config)
    extras = []
    for tensor in source.entries:
        if tensor in used:
            continue
        if not tensor.startswith(prefix):
            raise source.refuse(f"tensor {tensor!r} does not start with {prefix!r} as PEFT writes it")
        if not any(is_saved(tensor, name) for name in saved) and copied_module(tensor) not in modules:
            raise source.refuse(
                f"tensor {tensor!r} is neither part of an update nor below modules_to_save={sorted(saved)}"
                f"{by_tying(source)}; it is refused rather than dropped"
            )
        extras.append(tensor)
    return extras
