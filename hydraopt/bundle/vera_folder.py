"""One VeRA task of a bundle: as the vectors PEFT reads, or, for servers, as the LoRA it is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hydraopt.adapters.module import PREFIX
from hydraopt.adapters.vera import LAMBDA_B, LAMBDA_D, PROJECTION_A, PROJECTION_B, layer_name, projections
from hydraopt.bundle.chains import Chain, product
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.lora_folder import Folder, common_settings
from hydraopt.errors import BundleError

Shapes = dict[str, tuple[int, int]]
"""(d_out, d_in) of the base model's linear layers, by name."""


def vera_settings(bundle: Bundle, task: str) -> dict[str, Any]:
    """The ``VeraConfig`` fields of a task. Its targets are all it had: the projections' sizes follow from them."""
    settings = bundle.manifest.tasks[task].settings
    return common_settings(bundle, task) | {
        "r": settings["r"],
        "projection_prng_key": settings["projection_prng_key"],
        "target_modules": sorted({layer_name(name) for name in bundle.factors(task)}),
        "vera_dropout": 0.0,
        "fan_in_fan_out": bool(settings.get("fan_in_fan_out")),
        "save_projection": False,
    }


def vera_vectors(bundle: Bundle, task: str) -> dict[str, Tensor]:
    """The vectors by the name of their module, in the bundle's dtype."""
    dtype = bundle.dtype
    return {name: product(chain)[0].to(dtype) for name, chain in bundle.factors(task).items()}


def vera_folder(bundle: Bundle, task: str) -> Folder:
    """The vectors; the projections too where the adapter had them, so that a reader can check them."""
    tensors = {name: tensor.contiguous() for name, tensor in bundle.extras(task).items()}
    vectors = vera_vectors(bundle, task)
    tensors |= {f"{PREFIX}{name}": vector.contiguous() for name, vector in vectors.items()}
    settings = vera_settings(bundle, task)
    width = bundle.manifest.tasks[task].settings.get("projection_width")
    if width is not None:
        height = max(vector.numel() for name, vector in vectors.items() if name.endswith(LAMBDA_B))
        drawn = projections(int(settings["projection_prng_key"]), int(settings["r"]), height, int(width))
        tensors |= dict(zip((PROJECTION_A, PROJECTION_B), drawn, strict=True))
    config = {"peft_type": "VERA", "bias": "none", **settings, "save_projection": width is not None}
    return Folder(config, tensors)


def vera_projections(bundle: Bundle, task: str, shapes: Shapes) -> tuple[Tensor, Tensor]:
    """``P_A`` and ``P_B`` that the task was trained with: as wide and high as its widest and highest layer.

    Args:
        bundle: The merged set.
        task: A VeRA task of it.
        shapes: Of the base model's layers: a VeRA file does not say how wide they are.

    Raises:
        BundleError: If the base model lacks a layer of the task or has it in another size.
    """
    base = bundle.manifest.base_model.name
    settings = bundle.manifest.tasks[task].settings
    names = []
    for vector, chain in bundle.factors(task).items():
        name, numbers = layer_name(vector), chain[-1].shape[1]
        if vector.endswith(LAMBDA_B):
            names.append(name)
            if shapes.get(name, (None,))[0] != numbers:
                raise BundleError(
                    f"task {task!r} updates {name!r} with {numbers} outputs, but in the base model it is "
                    f"{shapes.get(name, 'no linear layer')}; the bundle belongs to {base!r}"
                )
    height, width = (max(shapes[name][side] for name in names) for side in (0, 1))
    trained = settings.get("projection_width", width)
    if trained != width:
        raise BundleError(
            f"task {task!r} was trained with projections {trained} wide, but its widest layer in the base model has "
            f"{width} inputs; the bundle belongs to {base!r}"
        )
    return projections(int(settings["projection_prng_key"]), int(settings["r"]), height, width)


def vera_as_lora(bundle: Bundle, task: str, shapes: Shapes) -> dict[str, Chain]:
    """The task's updates as LoRA, exactly and without an SVD.

    ``B = diag(b) P_B[:d_out]`` and ``A = diag(d) P_A[:, :d_in]``. Arguments and errors as for
    :func:`vera_projections`.
    """
    down, up = vera_projections(bundle, task, shapes)
    vectors = {name: vector.float() for name, vector in vera_vectors(bundle, task).items()}
    dtype = bundle.dtype
    chains: dict[str, Chain] = {}
    for name in sorted({layer_name(name) for name in vectors}):
        d_out, d_in = shapes[name]
        b, d = vectors[name + LAMBDA_B], vectors[name + LAMBDA_D]
        chains[name] = (b[:, None] * up[:d_out]).to(dtype), (d[:, None] * down[:, :d_in]).to(dtype)
    return chains
