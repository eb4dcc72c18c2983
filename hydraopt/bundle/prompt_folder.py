"""One prompt-tuning or prefix-tuning task of a bundle as a PEFT folder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hydraopt.adapters.prompts import EMBEDDINGS, SIZES
from hydraopt.bundle.chains import product
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.lora_folder import Folder, common_settings


def prompt_settings(bundle: Bundle, task: str) -> dict[str, Any]:
    """The fields of the task's ``PromptTuningConfig`` or ``PrefixTuningConfig``."""
    entry = bundle.manifest.tasks[task]
    return common_settings(bundle, task) | {name: entry.settings[name] for name in SIZES}


def prompt_matrix(bundle: Bundle, task: str) -> Tensor:
    """The virtual tokens (tokens, width), in the bundle's dtype."""
    (chain,) = bundle.factors(task).values()
    return product(chain).to(bundle.dtype)


def prompt_folder(bundle: Bundle, task: str) -> Folder:
    """The virtual tokens, and the whole layers beside them."""
    tensors = {name: tensor.contiguous() for name, tensor in bundle.extras(task).items()}
    tensors[EMBEDDINGS] = prompt_matrix(bundle, task).contiguous()
    return Folder({"peft_type": bundle.manifest.tasks[task].kind, **prompt_settings(bundle, task)}, tensors)
