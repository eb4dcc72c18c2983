"""A bundle of prompts inside a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hydraopt.bundle.attach_extras import place_extras
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.prompt_folder import prompt_matrix, prompt_settings

_CONFIGS = {"PROMPT_TUNING": PromptTuningConfig, "PREFIX_TUNING": PrefixTuningConfig}


def attach_prompts(bundle: Bundle, base_model: nn.Module, names: Mapping[str, str]) -> PeftModel:
    """Put tasks of a bundle, prompts of one kind, into a base model."""
    model: Any = None
    for name, task in names.items():
        config = _CONFIGS[bundle.manifest.tasks[task].kind](**prompt_settings(bundle, task))
        if model is None:
            model = get_peft_model(base_model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        embedding = model.prompt_encoder[name].embedding
        embedding.weight = nn.Parameter(prompt_matrix(bundle, task).to(embedding.weight), requires_grad=False)
        place_extras(model, name, bundle.extras(task))
    return model
