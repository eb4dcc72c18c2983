"""AdaLoRA (Zhang et al., arXiv 2303.10512) as PEFT stores and computes it.

``dW = B (A * E) * s / (n + 1e-5)`` with ``A`` (r, d_in), ``E`` (r, 1), ``B`` (d_out, r), ``s = alpha`` and n the
*initial* rank: PEFT keeps n when it prunes a module to a smaller rank, and divides by n + 1e-5. A module may be
pruned to rank 0; its update is then zero. ``rank_pattern`` holds, per module, which of the initial directions are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hydraopt.adapters.configuration import number, whole_number
from hydraopt.adapters.lora import IGNORED, REFUSED, check_init, check_target
from hydraopt.adapters.module import PREFIX, AdapterModule, Contents, Kind, Parts, Source
from hydraopt.adapters.whole_tensors import whole_tensors

_DOWN, _UP, _VALUES, _COUNT = ".lora_A", ".lora_B", ".lora_E", ".ranknum"
_PEFT_EPS = 1e-5  # PEFT's guard against a division by zero; it is part of the result


class AdaLoraKind(Kind):
    """AdaLoRA on linear layers."""

    name = "ADALORA"
    refused = REFUSED | {"use_dora": "AdaLoRA has no DoRA"}
    ignored = IGNORED | {
        "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    }  # fmt: skip

    def read(self, source: Source) -> Contents:
        """Gather A, B and E of every module."""
        check_init(source)
        masks = _masks(source)
        modules = {}
        for tensor in source.entries:
            if tensor.startswith(PREFIX) and tensor.endswith(_DOWN):
                module = _module(source, tensor.removesuffix(_DOWN), masks)
                modules[module.name] = module
        used = {tensor for module in modules.values() for tensor in module.tensors}
        used |= {f"{PREFIX}{name}{_COUNT}" for name in modules}
        extras = whole_tensors(source, modules, used)
        if not modules:
            raise source.refuse("no lora_A / lora_B / lora_E tensors inside")
        unknown = sorted(set(masks) - set(modules))
        if unknown:
            raise source.refuse(f"rank_pattern names {unknown[0]!r}, which has no tensors")
        flags = {"fan_in_fan_out": True} if source.config.get("fan_in_fan_out") else {}
        return Contents(modules, tuple(extras), dict(flags))

    def parts(self, module: AdapterModule, read: Callable[[str], Tensor]) -> Parts:
        """B and ``A * E`` in float32, as PEFT multiplies them; one zero direction where the rank is 0."""
        up, down, values = (read(name).float() for name in module.tensors)
        if down.shape[0] == 0:
            return torch.zeros(module.d_out, 1), torch.zeros(1, module.d_in), 1.0
        return up, down * values, module.scaling


def _module(source: Source, stem: str, masks: dict[str, list[bool]]) -> AdapterModule:
    name = stem.removeprefix(PREFIX)
    names = (stem + _UP, stem + _DOWN, stem + _VALUES)
    for tensor in names:
        if tensor not in source.entries:
            raise source.refuse(f"module {name!r} lacks {tensor!r}")
    check_target(source, name)
    (d_out, rank), (rows, d_in), values = (source.matrix(tensor) for tensor in names)
    initial = whole_number(source.where, source.config, "init_r")
    expected = sum(masks[name]) if name in masks else initial
    if (rows, *values) != (rank, rank, 1) or rank != expected:
        raise source.refuse(
            f"module {name!r}: lora_A has {rows} rows, lora_B {rank} columns and lora_E shape {list(values)}, but "
            f"the configuration (init_r, rank_pattern) says rank {expected}"
        )
    alpha = number(source.where, source.config, "lora_alpha")
    count = float(initial)
    if stem + _COUNT in source.entries:
        count = float(source.read(stem + _COUNT).float().reshape(-1)[0])
    scale = float(alpha) if alpha > 0 else float(expected)
    return AdapterModule(name, d_out, d_in, max(rank, 1), "linear", scale / (count + _PEFT_EPS), names)


def _masks(source: Source) -> dict[str, list[bool]]:
    """Per module which of the initial directions are left, by module name."""
    pattern: Any = source.config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise source.refuse(f"rank_pattern is {pattern!r}; expected an object")
    initial = whole_number(source.where, source.config, "init_r")
    masks = {}
    for key, mask in pattern.items():
        if not isinstance(mask, list) or len(mask) != initial or not all(value in (0, 1) for value in mask):
            raise source.refuse(f"rank_pattern of {key!r} is not a list of {initial} yes or no (init_r)")
        masks[str(key).removesuffix(".default").removesuffix(_VALUES)] = [bool(value) for value in mask]
    return masks
