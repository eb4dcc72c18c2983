"""How an attached task's factors lie in a model, and how they are saved and loaded as PEFT saves and loads a LoRA's.

PEFT keeps two matrices of every adapter and module. What tasks share lies in the model once, and a head may be two
factors; to PEFT's own ``save_pretrained`` and ``load_adapter`` either is a matrix like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


class LowRankHead(nn.Module):
    """A head kept as two factors: ``x -> (x inner^T) up^T``.

    ``weight`` is their product (d_out, q), made on demand: PEFT reads it when it merges an adapter into the base. It is
    saved, and loaded, as that.
    """

    def __init__(self, up: nn.Parameter, inner: nn.Parameter) -> None:
        super().__init__()
        self.up = up
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        """The dense head (d_out, q)."""
        return self.up @ self.inner

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., q) to (..., d_out)."""
        return nn.functional.linear(nn.functional.linear(x, self.inner), self.up)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        save_weight(self.weight, destination, prefix, keep_vars=keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        _metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        _unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        given, own = state_dict[key], self.weight
        if given.shape != own.shape:
            error_msgs.append(f"size mismatch for {key}: {tuple(given.shape)} instead of {tuple(own.shape)}")
        elif not holds(own, given):
            is_trained = self.up.requires_grad
            self.up = nn.Parameter(given.to(own, copy=True), requires_grad=is_trained)
            self.inner = nn.Parameter(torch.eye(own.shape[1]).to(own), requires_grad=is_trained)


def parameter_like(tensor: Tensor, like: Any) -> nn.Parameter:
    """A copy on the device of a base weight, in the dtype it is computed with."""
    return nn.Parameter(
        tensor.to(device=like.device, dtype=float_dtype(like), copy=True), requires_grad=False
    )


def float_dtype(like: Any) -> torch.dtype:
    """The dtype that a base weight is computed with; quantised ones compute in float."""
    own: torch.dtype = like.dtype
    return own if own.is_floating_point else torch.float32


def save_weight(weight: Tensor, destination: dict[str, Any], prefix: str, *, keep_vars: bool) -> None:
    """Put a matrix that is made on demand into a state dict, under the name a linear layer's has."""
    destination[f"{prefix}weight"] = weight if keep_vars else weight.detach()


def holds(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether ``one`` is what ``other`` would be after it was loaded there; both may be missing."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and torch.equal(other.to(one), one)


def keep_apart(model: nn.Module) -> None:
    """Let numbers that are loaded for one adapter change that one alone, and not those that share its Parameter."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for adapters in (layer.lora_A, layer.lora_embedding_A):
                adapters.register_load_state_dict_pre_hook(_own_copies)


def _own_copies(adapters: Any, state_dict: Mapping[str, Any], prefix: str, *_: object) -> None:
    holders: dict[int, list[str]] = {}
    for name, held in adapters.items():
        holders.setdefault(id(_weight(held)), []).append(name)
    for names in holders.values():
        weight = _weight(adapters[names[0]])
        given = [state_dict.get(prefix + name + _ending(adapters[name])) for name in names]
        if weight is None or all(holds(given[0], new) for new in given):
            continue  # the same for everybody
        for name, new in zip(names, given, strict=True):
            if new is None or holds(weight, new):
                continue
            own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            if isinstance(adapters[name], nn.Parameter):
                adapters[name] = own
            else:
                adapters[name].weight = own


def _weight(held: Any) -> nn.Parameter | None:
    """The Parameter of an adapter's A, in either of PEFT's ways to hold it; a packed one has none."""
    weight = held.weight if isinstance(held, nn.Linear) else held
    return weight if isinstance(weight, nn.Parameter) else None


def _ending(held: Any) -> str:
    return "" if isinstance(held, nn.Parameter) else ".weight"
