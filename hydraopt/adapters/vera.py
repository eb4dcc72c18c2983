"""VeRA (Kopiczko et al., arXiv 2310.11454) as PEFT stores it.

``dW = diag(b) P_B[:d_out] diag(d) P_A[:, :d_in]``: the projections ``P_A`` (r, widest d_in) and ``P_B`` (widest d_out,
r) are random and the same for all modules; they follow from ``projection_prng_key``. What was trained are ``b`` (d_out)
and ``d`` (r) of every module, so these vectors are what is merged: each is a matrix of one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hydraopt.adapters.configuration import whole_number
from hydraopt.adapters.lora import check_target
from hydraopt.adapters.module import PREFIX, AdapterModule, Contents, Kind, Parts, Source
from hydraopt.adapters.whole_tensors import whole_tensors

LAMBDA_B, LAMBDA_D = ".vera_lambda_b", ".vera_lambda_d"
PROJECTION_A, PROJECTION_B = "base_model.vera_A", "base_model.vera_B"


class VeraKind(Kind):
    """VeRA on linear layers."""

    name = "VERA"
    refused: ClassVar[dict[str, str]] = {}
    ignored = frozenset({
        "r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out",
        "bias", "init_weights", "layers_to_transform", "layers_pattern",
    })  # fmt: skip

    def read(self, source: Source) -> Contents:
        """Take the two vectors of every module; projections that follow from the key are left out."""
        rank = whole_number(source.where, source.config, "r")
        key = whole_number(source.where, source.config, "projection_prng_key", least=0)
        modules: dict[str, AdapterModule] = {}
        for tensor in source.entries:
            for own, other in ((LAMBDA_B, LAMBDA_D), (LAMBDA_D, LAMBDA_B)):
                if tensor.startswith(PREFIX) and tensor.endswith(own):
                    if tensor.removesuffix(own) + other not in source.entries:
                        raise source.refuse(f"{tensor!r} has no matching {other.strip('.')}")
                    module = _vector(source, tensor, rank if own == LAMBDA_D else None)
                    modules[module.name] = module
        if not modules:
            raise source.refuse("no vera_lambda_b / vera_lambda_d tensors inside")
        for name in modules:
            check_target(source, layer_name(name))
        widest = max(module.d_in for name, module in modules.items() if name.endswith(LAMBDA_B))
        settings: dict[str, bool | int | float | str] = {"r": rank, "projection_prng_key": key}
        width = _check_projections(source, rank, key, widest)
        if width is not None:
            settings["projection_width"] = width
        if source.config.get("fan_in_fan_out"):
            settings["fan_in_fan_out"] = True
        used = {tensor for module in modules.values() for tensor in module.tensors}
        extras = whole_tensors(source, modules, used | {PROJECTION_A, PROJECTION_B})
        return Contents(modules, tuple(extras), settings)

    def parts(self, module: AdapterModule, read: Callable[[str], Tensor]) -> Parts:
        """The vector as the one row of a matrix."""
        row = read(module.tensors[0])[None, :]
        return torch.ones(1, 1, dtype=row.dtype), row, 1.0


def layer_name(vector: str) -> str:
    """The layer a vector belongs to, from the name of its module."""
    return vector.removesuffix(LAMBDA_B).removesuffix(LAMBDA_D)


def projections(key: int, rank: int, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """``P_A`` (rank, d_in) and ``P_B`` (d_out, rank) in float32, number for number as PEFT draws them.

    Kaiming-uniform over the columns, A before B, from one generator on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(key)
    drawn = []
    for shape in ((rank, d_in), (d_out, rank)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


def _vector(source: Source, tensor: str, length: int | None) -> AdapterModule:
    name = tensor.removeprefix(PREFIX)
    found = source.vector(tensor)
    if length is not None and found != length:
        raise source.refuse(f"{tensor!r} has {found} numbers, but the configuration says r={length}")
    return AdapterModule(name, 1, found, 1, "vector", 1.0, (tensor,))


def _check_projections(source: Source, rank: int, key: int, widest_out: int) -> int | None:
    """The width of saved projections; None where they were not saved.

    Raises:
        AdapterFormatError: If they are not what the key gives, as one side of the pair is missing, say.
    """
    saved = [name for name in (PROJECTION_A, PROJECTION_B) if name in source.entries]
    if not saved:
        if source.config.get("save_projection", True):
            raise source.refuse(
                "save_projection is set, but vera_A and vera_B are missing; set it to false if they follow from "
                "projection_prng_key"
            )
        return None
    if len(saved) == 1:
        raise source.refuse(f"{saved[0]!r} is there without its partner")
    a, b = source.matrix(PROJECTION_A), source.matrix(PROJECTION_B)
    if (a[0], b) == (rank, (widest_out, rank)):
        drawn = projections(key, rank, b[0], a[1])
        stored = source.read(PROJECTION_A), source.read(PROJECTION_B)
        if all(torch.equal(one, other.float()) for one, other in zip(drawn, stored, strict=True)):
            return a[1]
    raise source.refuse(
        f"its vera_A {list(a)} and vera_B {list(b)} are not those that projection_prng_key={key} gives, so they cannot "
        "be shared; convert it to LoRA with `peft.save_as_lora` and merge that"
    )
