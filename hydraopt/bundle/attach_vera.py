"""A bundle of VeRA tasks inside a transformers model: projections in memory once, two vectors per task and layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

from hydraopt.adapters.module import PREFIX
from hydraopt.adapters.vera import LAMBDA_B, layer_name
from hydraopt.base_models import linear_shape
from hydraopt.bundle.attach_extras import place_extras
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.vera_folder import Shapes, vera_projections, vera_settings, vera_vectors


def attach_vera(bundle: Bundle, base_model: nn.Module, names: Mapping[str, str]) -> PeftModel:
    """Put VeRA tasks of a bundle into a base model.

    Each task gets the projections it was trained with: PEFT would give all of them those of the first, which are of
    another size where the targets differ.

    Raises:
        BundleError: If the base model lacks a layer of the tasks or has it in another size.
    """
    shapes: Shapes = {
        name: shape
        for name, module in base_model.named_modules()
        if (shape := linear_shape(module)) is not None
    }
    drawn = _projections(bundle, names.values(), shapes)
    model: Any = None
    for name, task in names.items():
        config = VeraConfig(**vera_settings(bundle, task))
        if model is None:
            model = get_peft_model(base_model, config, adapter_name=name)
        _put_projections(model, name, drawn[task])
        if name not in model.peft_config:
            model.add_adapter(name, config)
        for module, vector in vera_vectors(bundle, task).items():
            layer = model.get_submodule(PREFIX + layer_name(module))
            side = layer.vera_lambda_b if module.endswith(LAMBDA_B) else layer.vera_lambda_d
            side[name] = nn.Parameter(vector.to(side[name], copy=True), requires_grad=False)
        place_extras(model, name, bundle.extras(task))
    return model


def _projections(bundle: Bundle, tasks: Iterable[str], shapes: Shapes) -> dict[str, tuple[Tensor, Tensor]]:
    """The projections of each task, equal ones as the same tensors."""
    kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    drawn = {}
    for task in tasks:
        a, b = vera_projections(bundle, task, shapes)
        # The key and r are the same for all tasks of a bundle: the sizes tell projections apart.
        drawn[task] = kept.setdefault((a.shape[1], b.shape[0]), (a, b))
    return drawn


def _put_projections(model: Any, name: str, drawn: tuple[Tensor, Tensor]) -> None:
    """Where PEFT looks for them; all layers read this one place."""
    for side, tensor in zip((model.base_model.vera_A, model.base_model.vera_B), drawn, strict=True):
        like = next(iter(side.values()))
        side[name] = tensor if tensor.device == like.device else tensor.to(like.device)
