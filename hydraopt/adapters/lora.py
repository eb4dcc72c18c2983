"""LoRA as PEFT stores it: which tensors make one update, and the scaling PEFT applies to it.

``dW = s B A`` with ``A`` (r, d_in), ``B`` (d_out, r) and ``s = alpha / r``, or ``alpha / sqrt(r)`` for
rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732). ``rank_pattern`` and ``alpha_pattern`` replace
r and alpha for the modules they match. On an embedding table (vocabulary, d_out) the update is ``dW^T = s B A``, so
d_in is the vocabulary.

DoRA (Liu et al., arXiv 2402.09353) computes ``m (W + s B A) / |W + s B A|``, with a norm per output. The direction
``s B A`` is an ordinary update; the magnitude ``m`` (d_out) is carried as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hydraopt.adapters.configuration import is_target, number
from hydraopt.adapters.module import PREFIX, AdapterModule, Contents, Kind, Layer, Parts, Source
from hydraopt.adapters.name_patterns import matches
from hydraopt.adapters.whole_tensors import MAGNITUDE, by_tying, whole_tensors

# (how A ends, how B ends, what the update is added to)
_PAIRS: tuple[tuple[str, str, Layer], ...] = (
    (".lora_A.weight", ".lora_B.weight", "linear"),
    (".lora_embedding_A", ".lora_embedding_B", "embedding"),
)

# Settings that change what the adapter computes, in ways that are not s B A on the stored base weights.
REFUSED = {
    "lora_bias": "a bias inside the update is not a product of two factors",
    "use_qalora": "QALoRA pools the inputs before A",
    "layer_replication": "replicated layers change the base model",
    "trainable_token_indices": "trained token rows are not a low-rank update",
    "target_parameters": "updates of bare parameters are not supported",
    "alora_invocation_tokens": "an activated LoRA acts on a part of the sequence only",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA changes the base weights",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "velora_config": "VeLoRA is not supported",
    "monteclora_config": "MonteCLoRA is not supported",
    "megatron_config": "Megatron layers are not supported",
}
# Settings that `read` handles, that say how it was trained, or where the tensors are.
IGNORED = frozenset({
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying",
})  # fmt: skip
# These initialisations move a part of the base weight into the adapter; unless it was converted on
# saving, the adapter is right only on a base model changed in the same way.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class LoraKind(Kind):
    """LoRA, rank-stabilised LoRA and DoRA, on linear layers and embedding tables."""

    name = "LORA"
    refused = REFUSED
    ignored = IGNORED

    def read(self, source: Source) -> Contents:
        """Pair A with B, and with the magnitude where there is one."""
        config = source.config
        check_init(source)
        for key in ("r", "lora_alpha"):
            number(source.where, config, key)
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(key) or {}, dict):
                raise source.refuse(f"{key} is {config[key]!r}; expected an object")
        modules: dict[str, AdapterModule] = {}
        for tensor in source.entries:
            for a, b, layer in _PAIRS:
                if tensor.startswith(PREFIX) and tensor.endswith(a):
                    module = _module(source, tensor, tensor.removesuffix(a) + b, layer)
                    modules[module.name] = module
                elif tensor.endswith(b) and tensor.removesuffix(b) + a not in source.entries:
                    raise source.refuse(f"{tensor!r} has no matching {a.split('.')[1]}")
        used = {tensor for module in modules.values() for tensor in module.tensors}
        magnitudes = _magnitudes(source, modules)
        extras = whole_tensors(source, modules, used | set(magnitudes))
        if not modules:
            raise source.refuse("no lora_A / lora_B tensors inside")
        flags = {"fan_in_fan_out": config.get("fan_in_fan_out"), "use_dora": config.get("use_dora")}
        return Contents(
            modules, tuple(sorted([*extras, *magnitudes])), {flag: True for flag, on in flags.items() if on}
        )

    def parts(self, module: AdapterModule, read: Callable[[str], Tensor]) -> Parts:
        """B and A as they are stored."""
        up, down = module.tensors
        return read(up), read(down), module.scaling


def check_init(source: Source) -> None:
    """Refuse initialisations that changed the base model.

    Raises:
        AdapterFormatError: If ``init_lora_weights`` names one.
    """
    init = str(source.config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise source.refuse(
            f"init_lora_weights={init!r} changes the base model's weights. Save it as plain LoRA first: "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        )


def check_target(source: Source, name: str) -> None:
    """Refuse a module that PEFT would not load.

    Raises:
        AdapterFormatError: If ``target_modules`` does not name it, or a wrapper's part of the name hides it.
    """
    parts = name.split(".")
    if "_orig_mod" in parts or parts[0] == "module":
        raise source.refuse(
            f"module {name!r} is named as inside a wrapper (torch.compile, DistributedDataParallel), where PEFT would "
            "not find it: save the model that was wrapped"
        )
    targets = source.config.get("target_modules")
    if not is_target(name, targets):
        raise source.refuse(
            f"module {name!r} has tensors of an update, but target_modules={targets!r} does not name it"
            f"{by_tying(source)}"
        )


def _module(source: Source, down: str, up: str, layer: Layer) -> AdapterModule:
    config = source.config
    name = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", down.removeprefix(PREFIX))
    if up not in source.entries:
        raise source.refuse(
            f"{down!r} has no matching {'lora_B' if layer == 'linear' else 'lora_embedding_B'}"
        )
    check_target(source, name)
    rank = _pattern_value(config.get("rank_pattern"), name, config["r"])
    if rank != int(rank):
        raise source.refuse(f"module {name!r}: the configuration says rank {rank}; expected a whole number")
    rank = int(rank)
    alpha = float(_pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"]))
    a, b = source.matrix(down), source.matrix(up)
    if a[0] != rank or b[1] != rank or rank < 1:
        raise source.refuse(
            f"module {name!r}: {down.rsplit('.lora_', 1)[1]} of shape {list(a)} and its partner of {list(b)}, "
            f"but the configuration says rank {rank}"
        )
    if not math.isfinite(alpha):
        raise source.refuse(f"module {name!r}: lora_alpha is {alpha}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return AdapterModule(name, b[0], a[1], rank, layer, scaling, (up, down))


def _magnitudes(source: Source, modules: Mapping[str, AdapterModule]) -> list[str]:
    """The magnitude vectors of DoRA: one per module, or none at all without DoRA."""
    found = [tensor for tensor in source.entries if tensor.startswith(PREFIX) and tensor.endswith(MAGNITUDE)]
    if not source.config.get("use_dora"):
        if found:
            raise source.refuse(f"{found[0]!r} is a magnitude of DoRA, but use_dora is not set")
        return []
    for name, module in modules.items():
        tensor = f"{PREFIX}{name}{MAGNITUDE}"
        if tensor not in source.entries:
            raise source.refuse(f"use_dora is set, but module {name!r} has no magnitude {tensor!r}")
        if source.vector(tensor) != module.d_out:
            raise source.refuse(
                f"{tensor!r} has {source.vector(tensor)} numbers for {module.d_out} outputs of the module"
            )
    stray = [tensor for tensor in found if tensor.removeprefix(PREFIX).removesuffix(MAGNITUDE) not in modules]
    if stray:
        raise source.refuse(f"{stray[0]!r} is the magnitude of a module without lora_A and lora_B")
    return found


def _pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule (``get_pattern_key``): the first key that matches a whole tail of the name."""
    for key, value in (pattern or {}).items():
        if matches(rf"(.*\.)?({key})", name):
            return value
    return default
