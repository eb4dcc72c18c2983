"""The tensors a task carries whole, put into a PeftModel: replaced layers, magnitudes, copies of base weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from hydraopt.adapters.module import PREFIX
from hydraopt.adapters.whole_tensors import MAGNITUDE, copied_module
from hydraopt.bundle.attached_factors import holds, parameter_like
from hydraopt.errors import BundleError


def place_extras(model: Any, name: str, extras: Mapping[str, Tensor]) -> None:
    """Give each tensor of an adapter its place, in the dtype and on the device of the base model's weights there.

    Raises:
        BundleError: If a copy of a base weight is not what the base model holds, which would change every task; or if
            the base model has no such tensor.
    """
    for path, tensor in extras.items():
        if path.endswith(MAGNITUDE):
            layer = model.get_submodule(path.removesuffix(MAGNITUDE))
            like = layer.get_base_layer().weight
            layer.lora_magnitude_vector[name].weight = parameter_like(tensor, like)
        elif (module := copied_module(path)) is not None:
            _check_copy(model.get_submodule(PREFIX + module), name, path, tensor)
        else:
            _replace(model, name, path, tensor)


def _check_copy(layer: Any, task: str, name: str, copy: Tensor) -> None:
    own = getattr(layer.get_base_layer(), name.rsplit(".", 1)[-1])
    # Either may have been rounded to the dtype of the other.
    if own is None or not (holds(own, copy) or holds(copy, own)):
        raise BundleError(
            f"task {task!r} carries its own {name!r}, which differs from the base model's: it was resized or trained. "
            "One model cannot hold both; export the task and load it alone"
        )


def _replace(model: Any, task: str, name: str, tensor: Tensor) -> None:
    path, leaf = name.rsplit(".", 1)
    module: Any = model
    for part in path.split("."):
        module = getattr(module, part, None)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[task]
    like = getattr(module, leaf, None)
    if like is None:
        raise BundleError(
            f"task {task!r} replaces {name.removeprefix(PREFIX)!r}, which the base model does not have: load it with "
            "the head that the task was trained with (AutoModelForSequenceClassification, say)"
        )
    if leaf in dict(module.named_buffers(recurse=False)):
        setattr(module, leaf, tensor.to(device=like.device, dtype=like.dtype, copy=True))
    else:
        setattr(module, leaf, parameter_like(tensor, like))
    if isinstance(module, nn.Linear) and leaf == "weight":
        module.out_features, module.in_features = tensor.shape
