"""A bundle inside a transformers model, as a ``PeftModel`` with one adapter per task and A' in memory once."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hydraopt.adapters.lora import PREFIX
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.export import lora_settings, nonzero_factors
from hydraopt.errors import BundleError


class LowRankHead(nn.Module):
    """A head kept as two factors: ``x -> (x inner^T) up^T``.

    ``weight`` is their product (d_out, q), made on demand: PEFT reads it when it merges an adapter into the base.
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


def attach(bundle: Bundle, base_model: nn.Module) -> PeftModel:
    """Put every task of a bundle into a base model.

    Args:
        bundle: The merged set.
        base_model: A transformers model of the bundle's base. It is changed in place, as PEFT does.

    Returns:
        A PeftModel in eval mode; ``set_adapter(task)`` switches. All tasks' ``lora_A`` of one module are the same
        Parameter. Factors take the dtype and device of the base model's weights.

    Raises:
        BundleError: If the base model lacks a module of the bundle or has it in another size.
    """
    _check_modules(bundle, base_model)
    shared_rows = _shared_rows(bundle, base_model)
    model: Any = None
    for task in bundle.task_names:
        factors = nonzero_factors(bundle, task)
        config = LoraConfig(**lora_settings(bundle, task, factors))
        if model is None:
            model = get_peft_model(base_model, config, adapter_name=task, low_cpu_mem_usage=True)
        else:
            model.add_adapter(task, config, low_cpu_mem_usage=True)
        for name, parts in factors.items():
            _place(model.get_submodule(PREFIX + name), task, parts, shared_rows.get(name))
        _place_extras(model, task, bundle.extras(task))
    model.requires_grad_(requires_grad=False)
    model.set_adapter(bundle.task_names[0])
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _check_modules(bundle: Bundle, base_model: nn.Module) -> None:
    found = dict(base_model.named_modules())
    for module in bundle.manifest.modules:
        weight = getattr(found.get(module.name), "weight", None)
        if weight is None:
            raise BundleError(
                f"the base model has no linear module {module.name!r}; the bundle belongs to "
                f"{bundle.manifest.base_model.name!r}"
            )
        if sorted(weight.shape) != sorted(module.shape):
            raise BundleError(
                f"module {module.name!r} is {tuple(weight.shape)} in the base model but {module.shape} in the bundle; "
                f"it belongs to {bundle.manifest.base_model.name!r}"
            )


def _shared_rows(bundle: Bundle, base_model: nn.Module) -> dict[str, nn.Parameter]:
    """A' of every module that has one, as the one Parameter all tasks will use."""
    return {
        name: _parameter(rows, base_model.get_submodule(name).weight)
        for name, rows in bundle.shared_rows().items()
    }


def _parameter(part: Tensor, like: Any) -> nn.Parameter:
    dtype = like.dtype if like.dtype.is_floating_point else torch.float32  # quantised bases compute in float
    return nn.Parameter(part.to(device=like.device, dtype=dtype, copy=True), requires_grad=False)


def _place(layer: LoraLayer, task: str, parts: tuple[Tensor, ...], shared: nn.Parameter | None) -> None:
    like = layer.get_base_layer().weight
    layer.lora_A[task] = _linear(_parameter(parts[-1], like) if shared is None else shared)
    if len(parts) == 3:
        layer.lora_B[task] = LowRankHead(_parameter(parts[0], like), _parameter(parts[1], like))
    else:
        layer.lora_B[task] = _linear(_parameter(parts[0], like))


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear


def _place_extras(model: PeftModel, task: str, extras: dict[str, Tensor]) -> None:
    for name, tensor in extras.items():
        path, leaf = name.rsplit(".", 1)
        module: Any = model
        for part in path.split("."):
            module = getattr(module, part)
            if isinstance(module, ModulesToSaveWrapper):
                module = module.modules_to_save[task]
        setattr(module, leaf, nn.Parameter(tensor.clone(), requires_grad=False))
        if isinstance(module, nn.Linear) and leaf == "weight":
            module.out_features, module.in_features = tensor.shape
