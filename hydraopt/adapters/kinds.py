"""The kinds of adapters that can be read exactly, and those that cannot, with the reason."""

from __future__ import annotations

from hydraopt.adapters.adalora import AdaLoraKind
from hydraopt.adapters.lora import LoraKind
from hydraopt.adapters.module import Kind
from hydraopt.adapters.prompts import PrefixTuningKind, PromptTuningKind
from hydraopt.adapters.vera import VeraKind
from hydraopt.errors import AdapterFormatError

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (LoraKind(), AdaLoraKind(), VeraKind(), PromptTuningKind(), PrefixTuningKind())
}

LORA_KINDS = frozenset({"LORA", "ADALORA"})
"""Kinds whose update is a plain product on a layer's weight: written back as LoRA, and attached together."""

PROMPT_KINDS = frozenset({"PROMPT_TUNING", "PREFIX_TUNING"})
"""Kinds that add virtual tokens and leave the layers alone."""

_REFUSED = {
    "IA3": "it multiplies activations by a vector; that is not an additive update",
    "LOHA": "an elementwise product of two low-rank matrices is not a low-rank update",
    "LOKR": "a Kronecker product is not a low-rank update",
    "OFT": "it rotates the weight; that is not an additive update",
    "BOFT": "it rotates the weight; that is not an additive update",
    "HRA": "it reflects the weight; that is not an additive update",
    "XLORA": "it mixes adapters by a gate at run time",
    "POLY": "it mixes adapters by a router at run time",
    "TRAINABLE_TOKENS": "trained token rows are not a low-rank update",
    "LN_TUNING": "it replaces normalisation weights; there is nothing to share",
    "FOURIERFT": "a sparse spectrum is not a low-rank update",
    "VBLORA": "its vector bank belongs to one adapter",
    "RANDLORA": "its update has full rank",
    "SHIRA": "a sparse update is not low-rank",
    "P_TUNING": "its prompt encoder is not supported; PROMPT_TUNING is",
    "MULTITASK_PROMPT_TUNING": "its task factors are not supported; PROMPT_TUNING is",
    "CPT": "its context projection is not supported; PROMPT_TUNING is",
    "ADAPTION_PROMPT": "it gates attention; that is not an additive update",
}


def find_kind(where: str, name: object) -> Kind:
    """The kind of that ``peft_type``.

    Raises:
        AdapterFormatError: If it is not supported; the message says why.
    """
    if isinstance(name, str) and name in KINDS:
        return KINDS[name]
    reason = f" ({_REFUSED[name]})" if isinstance(name, str) and name in _REFUSED else ""
    raise AdapterFormatError(
        f"{where}: adapters of kind {name!r} are not supported{reason}; supported are {', '.join(KINDS)}"
    )
