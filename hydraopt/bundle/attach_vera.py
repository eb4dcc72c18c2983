"""A bundle of VeRA tasks inside a transformers model: projections in memory once, two vectors per task and layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

from hydraopt.adapters.module import PREFIX
from hydraopt.adapters.vera import LAMBDA_B, layer_name
from hydraopt.base_models import linear_shape
from hydraopt.bundle.attach_extras import place_extras
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.vera_folder import Shapes, vera_projections, vera_settings, vera_vectors


def attach_vera(bundle: Bundle, base_model: nn.Module, tasks: Sequence[str]) -> PeftModel:
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
    drawn = _projections(bundle, tasks, shapes)
    model: Any = None
    for task in tasks:
        config = VeraConfig(**vera_settings(bundle, task))
        if model is None:
            model = get_peft_model(base_model, config, adapter_name=task)
        _put_projections(model, task, drawn[task])
        if task not in model.peft_config:
            model.add_adapter(task, config)
        for name, vector in vera_vectors(bundle, task).items():
            layer = model.get_submodule(PREFIX + layer_name(name))
            side = layer.vera_lambda_b if name.endswith(LAMBDA_B) else layer.vera_lambda_d
            side[task] = nn.Parameter(vector.to(side[task], copy=True), requires_grad=False)
        place_extras(model, task, bundle.extras(task))
    return model


def _projections(bundle: Bundle, tasks: Sequence[str], shapes: Shapes) -> dict[str, tuple[Tensor, Tensor]]:
    """The projections of each task, equal ones as the same tensors."""
    kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    drawn = {}
    for task in tasks:
        a, b = vera_projections(bundle, task, shapes)
        # The key and r are the same for all tasks of a bundle: the sizes tell projections apart.
        drawn[task] = kept.setdefault((a.shape[1], b.shape[0]), (a, b))
    return drawn


def _put_projections(model: Any, task: str, drawn: tuple[Tensor, Tensor]) -> None:
    """Where PEFT looks for them; all layers read this one place."""
    for side, tensor in zip((model.base_model.vera_A, model.base_model.vera_B), drawn, strict=True):
        like = next(iter(side.values()))
        side[task] = tensor if tensor.device == like.device else tensor.to(like.device)
