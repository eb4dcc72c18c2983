"""Prompt tuning (Lester et al., arXiv 2104.08691) and prefix tuning (Li and Liang, arXiv 2101.00190) in PEFT's files.

Either is one matrix ``P`` of virtual tokens: (tokens, width). There is no B; with the identity in its place it is a
product like any other, and tasks share the rows of A' in ``P_k ~ C_k A'``. Prompts of one shape are one module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hydraopt.adapters.configuration import whole_number
from hydraopt.adapters.module import AdapterModule, Contents, Kind, Parts, Source
from hydraopt.adapters.whole_tensors import whole_tensors

EMBEDDINGS = "prompt_embeddings"
PROMPT_PREFIX = "base_model."
"""How PEFT starts the names of whole layers beside a prompt."""

SIZES = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
"""Settings that say what the numbers of a prompt mean to the base model."""


class _PromptKind(Kind):
    refused: ClassVar[dict[str, str]] = {}
    ignored = frozenset({
        *SIZES, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
        "encoder_hidden_size", "prefix_projection", "init_weights",
    })  # fmt: skip

    def shape(self, sizes: dict[str, int]) -> tuple[int, int]:
        """(tokens, width) that the configuration calls for."""
        raise NotImplementedError

    def read(self, source: Source) -> Contents:
        """Take the matrix of virtual tokens."""
        if EMBEDDINGS not in source.entries:
            raise source.refuse(f"no {EMBEDDINGS} inside")
        sizes = {name: whole_number(source.where, source.config, name) for name in SIZES}
        found, expected = source.matrix(EMBEDDINGS), self.shape(sizes)
        if found != expected:
            raise source.refuse(
                f"{EMBEDDINGS} is {list(found)}, but the configuration calls for {list(expected)} (tokens, width)"
            )
        name = f"{EMBEDDINGS}.{found[0]}x{found[1]}"
        module = AdapterModule(name, *found, found[0], "prompt", 1.0, (EMBEDDINGS,))
        extras = whole_tensors(source, {}, {EMBEDDINGS}, PROMPT_PREFIX)
        return Contents({name: module}, tuple(extras), dict(sizes))

    def parts(self, module: AdapterModule, read: Callable[[str], Tensor]) -> Parts:
        """The identity and the prompt."""
        prompt = read(module.tensors[0])
        return torch.eye(module.d_out, dtype=prompt.dtype), prompt, 1.0


class PromptTuningKind(_PromptKind):
    """Virtual tokens before the input; an encoder-decoder has a set for each side."""

    name = "PROMPT_TUNING"

    def shape(self, sizes: dict[str, int]) -> tuple[int, int]:
        """Tokens of all sides, one embedding each."""
        return sizes["num_virtual_tokens"] * sizes["num_transformer_submodules"], sizes["token_dim"]


class PrefixTuningKind(_PromptKind):
    """Virtual keys and values in every layer. A prefix encoder is already applied in what PEFT saves."""

    name = "PREFIX_TUNING"

    def shape(self, sizes: dict[str, int]) -> tuple[int, int]:
        """A key and a value per token and layer."""
        return sizes["num_virtual_tokens"], sizes["num_layers"] * 2 * sizes["token_dim"]
