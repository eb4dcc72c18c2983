"""Whether the adapters of a set have enough in common to share anything, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hydraopt.adapters import Adapter
from hydraopt.adapters.similarity import Similarity, similarity
from hydraopt.devices import find_device
from hydraopt.merging import separate
from hydraopt.merging.budget import relative_error, within_budget
from hydraopt.merging.merge import make_recipe, open_set, silent
from hydraopt.merging.run import MergeRun
from hydraopt.progress import Progress

_CLEARLY = 0.97
_HIGH, _LOW = 0.5, 0.2


@dataclass(frozen=True)
class SharingAdvice:
    """Expected relative error at one budget with and without sharing, and what that means."""

    similarity: Similarity
    budget: float
    bits: int
    shared_error: float
    separate_error: float

    @property
    def pays(self) -> bool:
        """Whether sharing lowers the error clearly at equal bytes."""
        return self.shared_error < _CLEARLY * self.separate_error

    @property
    def words(self) -> str:
        """The advice as a sentence or two."""
        a, b = self.similarity.mean(self.similarity.a), self.similarity.mean(self.similarity.b)
        overlap = f"Between tasks A overlaps by {a:.2f} ({_grade(a)}) and B by {b:.2f} ({_grade(b)})."
        at = f"At {self.budget:.0%} of the bytes in {self.bits}-bit numbers the relative error would be"
        errors = f"{at} {self.shared_error:.4f} with sharing and {self.separate_error:.4f} without."
        if self.pays:
            side = "A'" if a >= b else "B' or both sides"
            return f"{overlap} {errors} Sharing pays: the tasks use the same directions, so keep {side} once for all."
        return (
            f"{overlap} {errors} Sharing pays little here: the tasks go their own ways. "
            "Fine-tuning all of them from one stored init would change that."
        )


def _grade(overlap: float) -> str:
    return "much" if overlap >= _HIGH else "some" if overlap >= _LOW else "little"


def sharing_advice(
    adapters: Mapping[str, Adapter | Path | str],
    *,
    budget: float = 0.25,
    bits: int = 16,
    device: str = "auto",
    progress: Progress | None = None,
) -> SharingAdvice:
    """Compare the adaptive merge with separate truncation at equal bytes, without building either.

    Args:
        adapters: Opened adapters or their folders, by task name; at least two.
        budget: Share of the bytes of all factors.
        bits: Bits per stored number.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Called with (done, total, what).

    Raises:
        AdapterMismatchError: If the adapters do not belong together.
        BudgetError: If ``budget`` is no share.
    """
    opened = open_set(adapters)
    recipe = make_recipe(budget=budget, bits=bits)
    run = MergeRun(opened, recipe, find_device(device), progress or silent)
    curves = run.trace()
    # Of the factors alone: headers and whole layers are the same with sharing and without.
    size = int(2 * budget * run.assembly.numbers)
    alone = curves.only({separate.NAME})
    errors = [
        relative_error(choices, run.total_weight)
        for choices in (within_budget(curves, size, alone), within_budget(alone, size))
    ]
    found = similarity(
        run.tasks,
        run.modules,
        lambda task, name: opened[task].factors(name) if name in opened[task].modules else None,
    )
    return SharingAdvice(found, budget, bits, errors[0], errors[1])
