"""LoRA as PEFT stores it: which tensors make one update, and the scaling PEFT applies to it.

``dW = s B A`` with ``A`` (r, d_in), ``B`` (d_out, r) and ``s = alpha / r``, or ``alpha / sqrt(r)`` for
rank-stabilised LoRA (Kalajdzievski, arXiv 2312.03732). ``rank_pattern`` and ``alpha_pattern`` replace
r and alpha for the modules they match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hydraopt.adapters.tensor_file import TensorEntry
from hydraopt.errors import AdapterFormatError

PREFIX = "base_model.model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"

# Settings that change what the adapter computes, in ways that are not s B A on the stored base weights.
# Each is refused when switched on, with the reason.
_REFUSED = {
    "use_dora": "DoRA rescales the columns of the whole weight; it is not a low-rank update",
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
# These initialisations move a part of the base weight into the adapter; unless it was converted on
# saving, the adapter is right only on a base model changed in the same way.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings that say how it was trained, or where the tensors are: nothing to compute from.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type",
    "peft_version", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "library_name",
}  # fmt: skip


@dataclass(frozen=True)
class LoraModule:
    """One updated linear layer: the names of its tensors, its size and its scaling."""

    name: str
    down: str  # tensor of A, (rank, d_in)
    up: str  # tensor of B, (d_out, rank)
    d_out: int
    d_in: int
    rank: int
    scaling: float


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Refuse, by name and with the reason, every setting that could not be merged exactly.

    Raises:
        AdapterFormatError: For the first such setting.
    """
    for setting, reason in _REFUSED.items():
        if config.get(setting):
            raise AdapterFormatError(f"{where}: {setting}={config[setting]!r} is not supported: {reason}")
    for setting, value in config.items():
        if setting not in _REFUSED and setting not in _IGNORED and value:
            raise AdapterFormatError(
                f"{where}: unknown setting {setting}={value!r}; it may change what the adapter computes, "
                "so it is refused rather than guessed"
            )
    if config.get("bias", "none") != "none":
        raise AdapterFormatError(
            f"{where}: bias={config['bias']!r} is not supported: trained biases are not low-rank"
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise AdapterFormatError(
            f"{where}: init_lora_weights={init!r} changes the base model's weights. Save it as plain LoRA first: "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`"
        )


def read_modules(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> tuple[dict[str, LoraModule], tuple[str, ...]]:
    """Sort an adapter's tensors into LoRA modules and whole-layer extras.

    Args:
        where: Named in errors.
        config: The parsed ``adapter_config.json``.
        tensors: Header entries of ``adapter_model.safetensors``.

    Returns:
        The modules by name (without PEFT's prefix), and the names of the ``modules_to_save`` tensors.

    Raises:
        AdapterFormatError: If a tensor is unknown, unpaired, or contradicts the configuration.
    """
    modules: dict[str, LoraModule] = {}
    extras: list[str] = []
    saved = saved_modules(config)
    for tensor in tensors:
        if not tensor.startswith(PREFIX):
            raise AdapterFormatError(
                f"{where}: tensor {tensor!r} does not start with {PREFIX!r} as PEFT writes it"
            )
        if tensor.endswith(_DOWN):
            module = _module(where, config, tensors, tensor)
            modules[module.name] = module
        elif tensor.endswith(_UP):
            if tensor.removesuffix(_UP) + _DOWN not in tensors:
                raise AdapterFormatError(f"{where}: {tensor!r} has no matching lora_A")
        elif _is_below(tensor.removeprefix(PREFIX), saved):
            extras.append(tensor)
        else:
            raise AdapterFormatError(
                f"{where}: tensor {tensor!r} is neither LoRA nor below modules_to_save={sorted(saved)}; "
                "it is refused rather than dropped"
            )
    if not modules:
        raise AdapterFormatError(f"{where}: no lora_A / lora_B tensors inside")
    return modules, tuple(extras)


def saved_modules(config: Mapping[str, Any]) -> set[str]:
    """Names of the layers the adapter replaces whole (``modules_to_save``)."""
    saved = set(config.get("modules_to_save") or ())
    if config.get("task_type") in {"SEQ_CLS", "TOKEN_CLS"}:
        saved |= {"classifier", "score"}  # PEFT adds them by itself for these task types
    return saved


def _is_below(tensor: str, saved: Iterable[str]) -> bool:
    path = tensor.split(".")[:-1]
    return any(part in path or tensor.startswith(f"{part}.") for part in saved)


def _module(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry], down: str
) -> LoraModule:
    up = down.removesuffix(_DOWN) + _UP
    name = down.removeprefix(PREFIX).removesuffix(_DOWN)
    if up not in tensors:
        raise AdapterFormatError(f"{where}: {down!r} has no matching lora_B")
    if not _is_target(name, config.get("target_modules")):
        raise AdapterFormatError(
            f"{where}: module {name!r} has LoRA tensors, but target_modules={config.get('target_modules')!r} "
            "does not name it"
        )
    rank = int(_pattern_value(config.get("rank_pattern"), name, config["r"]))
    alpha = float(_pattern_value(config.get("alpha_pattern"), name, config["lora_alpha"]))
    a, b = tensors[down], tensors[up]
    for tensor, entry in ((down, a), (up, b)):
        if len(entry.shape) != 2 or not entry.dtype.is_floating_point:
            raise AdapterFormatError(
                f"{where}: {tensor!r} has shape {list(entry.shape)} and dtype {entry.dtype}; expected a matrix of "
                "floats (convolutions are not supported)"
            )
    if a.shape[0] != rank or b.shape[1] != rank or rank < 1:
        raise AdapterFormatError(
            f"{where}: module {name!r}: lora_A is {list(a.shape)} and lora_B {list(b.shape)}, "
            f"but the configuration says rank {rank}"
        )
    if not math.isfinite(alpha):
        raise AdapterFormatError(f"{where}: module {name!r}: lora_alpha is {alpha}")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraModule(name, down, up, b.shape[0], a.shape[1], rank, scaling)


def _is_target(name: str, targets: object) -> bool:
    """PEFT's rule: a string is "all-linear" or a regular expression, a list holds names or suffixes."""
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, name) is not None
    if not isinstance(targets, list):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule (``get_pattern_key``): the first key that matches a whole tail of the name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
