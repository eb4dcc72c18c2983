"""The merges the quality benchmark compares, as data; and one of them made and sized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quality_one_for_all import ONE_FOR_ALL, one_update
from torch import Tensor

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
    merge can shrink, are left out on both sides. None is one update for all tasks at the adapters' rank.
    """

    method: str
    bits: int | str
    level: float | None
    counted: Counted = "files"
    own_inits: bool = False  # whether it is also made of adapters that started from different A


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
    *[Merge(method, 16, None) for method in ONE_FOR_ALL],
    *_levels("paper", 16, LEVELS_16),
    *_levels("paper", "auto", LEVELS_FREE),
    *_levels("two-sided", 16, LEVELS_16),
    *_levels("two-sided", "auto", LEVELS_FREE),
]
"""In the order in which they are made."""


@dataclass(frozen=True)
class Merged:
    """A merge that was made: every task's update and layers, and what all of it takes."""

    factors: Mapping[str, Mapping[str, tuple[Tensor, ...]]]  # by task and module; their product is the update
    extras: Mapping[str, Mapping[str, Tensor]]  # by task and PEFT name
    storage: float  # bytes over the adapters' bytes, these at two bytes a number
    storage_without_classifiers: float
    relative_squared_error: float  # mean over the tasks of |dW - merged|^2 / |dW|^2
    bundle: Bundle | None  # None for one update for all tasks


def make(merge: Merge, adapters: Mapping[str, Adapter]) -> Merged:
    """Merge.

    Raises:
        HydraoptError: If the level cannot be met.
        TypeError: If this version has no such setting.
    """
    inputs = sum(adapter.reference_bytes for adapter in adapters.values())
    if merge.level is None:
        update, error = one_update(merge.method, adapters)
        factors = dict.fromkeys(adapters, update)
        extras = {task: {name: a.extra(name) for name in a.extras} for task, a in adapters.items()}
        size = sum(2 * part.numel() for parts in update.values() for part in parts) + _extras_bytes(adapters)
        bundle = None
    else:
        bundle = hydraopt.merge(
            adapters,
            method=merge.method,
            bits=merge.bits,
            budget=_budget(merge.level, merge.counted, adapters),
        )
        factors = {task: bundle.factors(task) for task in adapters}
        extras = {task: bundle.extras(task) for task in adapters}
        size, error = bundle.manifest.bytes_on_disk, bundle.relative_error**2
    without = (size - _extras_bytes(adapters)) / _factor_bytes(adapters)
    return Merged(factors, extras, size / inputs, without, error, bundle)


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
