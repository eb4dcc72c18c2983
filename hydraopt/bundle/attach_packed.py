"""An attached bundle whose factors stay in memory as they are stored, in few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydraopt.adapters.module import PREFIX
from hydraopt.bundle.attached_factors import float_dtype, holds, save_weight
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.stored_rows import StoredRows
from hydraopt.errors import BundleError


class PackedRows(nn.Module):
    """Stored vectors as a module: its bytes move between devices with the model."""

    data: Tensor

    def __init__(self, stored: StoredRows, device: torch.device) -> None:
        super().__init__()
        self._block = stored.block
        self._dtype = stored.dtype
        self.register_buffer("data", stored.data.to(device, copy=True), persistent=False)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The vectors (count, length)."""
        return StoredRows(self.data, self._block, self._dtype).read().to(dtype)


class PackedChain(nn.Module):
    """Some factors of an update, the first to meet the input first.

    ``weight`` is their product (out, in), made on demand: PEFT reads it when it merges an adapter into the base, and it
    is what is saved. No other can be loaded.
    """

    def __init__(self, parts: Sequence[tuple[PackedRows, bool]], dtype: torch.dtype) -> None:
        super().__init__()
        self.parts = nn.ModuleList(rows for rows, _ in parts)
        self._ups = [up for _, up in parts]
        self._dtype = dtype

    def _matrices(self) -> list[Tensor]:
        """Each as ``x -> x matrix^T``."""
        matrices = []
        for rows, up in zip(self.parts, self._ups, strict=True):
            assert isinstance(rows, PackedRows)  # noqa: S101 - what the list was made of
            matrix = rows.read(self._dtype)
            matrices.append(matrix.mT if up else matrix)
        return matrices

    @property
    def weight(self) -> Tensor:
        """The product of the factors."""
        first, *rest = self._matrices()
        for matrix in rest:
            first = matrix @ first
        return first

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in) to (..., out)."""
        for matrix in self._matrices():
            x = nn.functional.linear(x, matrix)
        return x

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        save_weight(self.weight, destination, prefix, keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is not None and not holds(self.weight, given):
            *_, error_msgs = rest
            error_msgs.append(
                f"{prefix}weight is attached packed and stays so; attach without, or delete it first"
            )


def pack(bundle: Bundle, model: nn.Module, names: Mapping[str, str]) -> None:
    """Replace the factors of attached tasks by their stored bytes.

    Args:
        bundle: What was attached.
        model: The PeftModel; changed in place. A module's shared factors are in memory once.
        names: The task of each adapter in it.

    Raises:
        BundleError: If the tasks update anything but linear layers.
    """
    for module in bundle.modules_of(names.values()):
        if module.layer != "linear":
            raise BundleError(
                f"module {module.name!r} is of the kind {module.layer!r}, which cannot stay packed; attach without"
            )
    held: dict[int, PackedRows] = {}
    for name, task in names.items():
        for module_name, links in bundle.links(task).items():
            layer: Any = model.get_submodule(PREFIX + module_name)
            like = layer.get_base_layer().weight
            dtype = float_dtype(like)
            parts = []
            for link in links:
                rows = held.get(link.rows.data.data_ptr())
                if rows is None:
                    rows = held[link.rows.data.data_ptr()] = PackedRows(link.rows, like.device)
                parts.append((rows, link.up))
            layer.lora_A[name] = PackedChain(parts[:1], dtype)
            layer.lora_B[name] = PackedChain(parts[1:], dtype)
