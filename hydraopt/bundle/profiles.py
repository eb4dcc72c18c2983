"""Export profiles: what each consumer of LoRA folders reads.

``peft`` writes a task back as the kind it was; the others write plain LoRA with the scaling in B, without patterns,
magnitudes or whole layers. What differs between the servers, as their documents and loaders say:

==============  ====================================================  =======================================
profile         ranks                                                 and
==============  ====================================================  =======================================
``vllm``        one for all modules, a value of ``max_lora_rank``     reads LoRA on embedding tables
``sglang``      one for all modules                                   float16; q, k, v and gate, up together
``lorax``       one for all modules, at most 128                      a target must be in every layer
``llama-cpp``   one per module: it divides alpha by the tensor's      a table or whole layer ends the converter
``portable``    one for all modules, a value of ``max_lora_rank``     what all of these read
==============  ====================================================  =======================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hydraopt.errors import BundleError

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``max_lora_rank``; its default is 16, so larger ranks need the flag."""


@dataclass(frozen=True)
class Profile:
    """What a server reads."""

    name: str
    ranks: tuple[int, ...] | None  # one rank for all modules, from these; None: a rank per module
    tables: bool = False  # reads LoRA on embedding tables
    every_layer: bool = True  # wants both factors of every target in every layer
    together: tuple[tuple[str, ...], ...] = ()  # targets that must come together
    dtype: torch.dtype | None = None  # the only one it computes in


SERVERS = {
    profile.name: profile
    for profile in (
        Profile("portable", VLLM_RANKS[1:]),
        Profile("vllm", VLLM_RANKS, tables=True),
        Profile(
            "sglang",
            VLLM_RANKS,
            together=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
            dtype=torch.float16,
        ),
        Profile("lorax", (8, 16, 32, 64, 128)),
        Profile("llama-cpp", None, every_layer=False),
    )
}

PROFILES = ("peft", *SERVERS)


def find_server(name: str) -> Profile | None:
    """The profile of that name; None for ``peft``.

    Raises:
        BundleError: If there is none.
    """
    if name not in PROFILES:
        raise BundleError(f"profile={name!r}: use one of {', '.join(PROFILES)}")
    return SERVERS.get(name)


def fitting_rank(profile: Profile, task: str, widest: int) -> int:
    """The least rank the profile allows that holds ``widest`` directions.

    Raises:
        BundleError: If none does.
    """
    ranks = profile.ranks or (widest,)
    fitting = [rank for rank in ranks if rank >= widest]
    if not fitting:
        raise BundleError(
            f"task {task!r} has an update of rank {widest}; the profile {profile.name!r} ends at {ranks[-1]}. Merge at "
            "a smaller budget, or use the profile 'peft'"
        )
    return fitting[0]
