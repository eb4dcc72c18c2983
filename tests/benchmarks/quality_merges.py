"""The merges the quality benchmark compares, as data; and one of them made and sized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import hydraopt
from hydraopt import Adapter, Bundle

LEVELS_16 = (0.52, 0.35, 0.25, 0.16, 0.12)
LEVELS_FREE = (0.25, 0.125, 0.072, 0.047)
Counted = Literal["files", "factors"]


@dataclass(frozen=True)
class Merge:
    """One merge: a method, the bits it may store with, and a level of storage.

    ``level`` is a share of the adapters' bytes at two bytes a number. Counted over ``files`` it is the budget as users
    give it: everything the bundle holds over everything the adapters hold. Over ``factors`` the classifiers, which no
    merge can shrink, are left out on both sides. None is for the methods of one update for all tasks, at the
    adapters' rank; they merge ``on`` the entries of dW, or of A and B apart.
    """

    method: str
    bits: int | str
    level: float | None
    counted: Counted = "files"
    on: str | None = None
    own_inits: bool = False  # whether it is also made of adapters that started from different A

    @property
    def name(self) -> str:
        """The method, and what it works on where it has a choice."""
        return self.method if self.on is None else f"{self.method} on {self.on}"


def _levels(
    method: str, bits: int | str, levels: tuple[float, ...], own_inits: tuple[float, ...] = ()
) -> list[Merge]:
    return [Merge(method, bits, level, own_inits=level in own_inits) for level in levels]


MERGES = [
    *_levels("hydraopt", 16, LEVELS_16, own_inits=(0.52, 0.25, 0.12)),
    *_levels("hydraopt", "auto", LEVELS_FREE, own_inits=(0.25, 0.072)),
    *_levels("separate", 16, LEVELS_16, own_inits=(0.52, 0.25, 0.12)),
    *_levels("separate", "auto", LEVELS_FREE, own_inits=(0.25, 0.072)),
    *_levels("separate", 8, LEVELS_FREE),
    *_levels("separate", 4, LEVELS_FREE),
    *[
        Merge(method, bits, level, "factors", own_inits=level == 0.072)
        for bits, levels in ((16, (0.12,)), ("auto", (0.125, 0.072, 0.047)))
        for level in levels
        for method in ("hydraopt", "separate")
    ],
    *[
        Merge(method, 16, None, on=on)
        for on in ("dw", "factors")
        for method in ("ta", "ties", "dare", "dare-ties")
    ],
    *_levels("paper", 16, LEVELS_16),
    *_levels("paper", 4, LEVELS_FREE),
    *_levels("two-sided", 16, LEVELS_16),
    *_levels("two-sided", "auto", LEVELS_FREE),
]
"""In the order in which they are made."""


def make(merge: Merge, adapters: Mapping[str, Adapter]) -> Bundle:
    """Merge.

    Raises:
        HydraoptError: If the level cannot be met, or this version has no such method or setting.
    """
    budget = None if merge.level is None else _budget(merge.level, merge.counted, adapters)
    return hydraopt.merge(adapters, method=merge.method, bits=merge.bits, budget=budget, on=merge.on)


def share_without_extras(bundle: Bundle, adapters: Mapping[str, Adapter]) -> float:
    """Bytes of the bundle over those of the adapters' factors, whole-layer extras left out on both sides."""
    return (bundle.manifest.bytes_on_disk - _extras_bytes(adapters)) / _factor_bytes(adapters)


def _budget(level: float, counted: Counted, adapters: Mapping[str, Adapter]) -> float:
    if counted == "files":
        return level
    wanted = level * _factor_bytes(adapters) + _extras_bytes(adapters)
    return wanted / sum(adapter.reference_bytes for adapter in adapters.values())


def _factor_bytes(adapters: Mapping[str, Adapter]) -> int:
    """Bytes of all A and B at two bytes a number."""
    modules = (module for adapter in adapters.values() for module in adapter.modules.values())
    return sum(2 * module.rank * (module.d_out + module.d_in) for module in modules)


def _extras_bytes(adapters: Mapping[str, Adapter]) -> int:
    """Bytes of the layers the adapters bring whole, as bundles store them: unchanged."""
    return sum(adapter.file.entries[name].size for adapter in adapters.values() for name in adapter.extras)
