"""One way to store one module, and what it costs at any price of a byte.

A family of factors offers options (``A'`` of 8 rows, of 10, ...). Within an option nothing but independent choices
is left: at which precision each shared vector is kept, and which directions each head keeps, at which precision.
For a price ``lambda`` (weighted squared error per byte) the best of these minimises ``energy * noise + lambda * bytes``
for every direction alone, where leaving it out costs its whole energy (noise 1, no bytes). So only the lower convex
hull of the (bytes, noise) points matters, and a direction's precision depends on nothing but its energy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from hydraopt.merging.problem import ModuleProblem
from hydraopt.precision import PRECISIONS, Block, core_bits, vector_bytes

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LEFT_OUT = -1
"""Level of a direction that is not stored."""


@dataclass(frozen=True)
class Levels:
    """What an option stores: per vector an index into the precisions, or :data:`LEFT_OUT`."""

    shared: tuple[Ints, ...]  # one array per shared factor
    heads: Ints  # (H, P)


@dataclass(frozen=True)
class StoredModule:
    """The bytes of one module, and how close they come.

    ``shared`` and every one of ``heads`` are blocks of bytes in storage order; errors and norms are squared.
    """

    shared: list[Block]
    heads: dict[str, list[Block]]
    squared_error: dict[str, float]
    squared_norm: dict[str, float]


class Family(Protocol):
    """A family of factors with everything decided but the levels."""

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """The stored module: ``bits`` are the precisions that levels index, ``dtype`` the float dtype."""


@dataclass(frozen=True)
class Rates:
    """Bytes and noise of one vector or direction at each precision, finest first."""

    bytes: Floats
    noise: Floats
    long: tuple[int, ...]
    short: tuple[int, ...]
    copies: int

    @classmethod
    def of(
        cls, bits: Sequence[int], long: tuple[int, ...], short: tuple[int, ...] = (), copies: int = 1
    ) -> Rates:
        """Rates of a direction kept as ``copies`` vectors of each of these lengths.

        Args:
            bits: Precisions, finest first.
            long: Lengths of the vectors at the precision itself.
            short: Lengths of the vectors of small factors, see :func:`core_bits`.
            copies: Vectors of each.
        """
        fine = [core_bits(one) for one in bits]
        return cls(
            np.array(
                [
                    copies
                    * float(sum(vector_bytes(n, b) for n in long) + sum(vector_bytes(n, f) for n in short))
                    for b, f in zip(bits, fine, strict=True)
                ]
            ),
            np.array(
                [
                    min(1.0, len(long) * PRECISIONS[b].noise + len(short) * PRECISIONS[f].noise)
                    for b, f in zip(bits, fine, strict=True)
                ]
            ),
            long,
            short,
            copies,
        )

    def at(self, bits: Sequence[int]) -> Rates:
        """The same direction at other precisions."""
        return Rates.of(bits, self.long, self.short, self.copies)

    def hull(self, *, may_leave_out: bool) -> tuple[Ints, Floats, Floats, Floats]:
        """The precisions worth using, cheapest first.

        Returns:
            Their levels; their bytes; their noise; and thresholds: a vector of energy ``e`` takes the last one whose
            ``threshold * lambda`` is below ``e``. The first threshold is 0.
        """
        points = [
            (float(b), float(e), level)
            for level, (b, e) in enumerate(zip(self.bytes, self.noise, strict=True))
        ]
        points = sorted([(0.0, 1.0, LEFT_OUT), *points] if may_leave_out else points)
        kept: list[tuple[float, float, int]] = []
        for point in points:
            if kept and point[1] >= kept[-1][1]:  # dearer and no better
                continue
            while len(kept) > 1 and _slope(kept[-2], point) >= _slope(kept[-2], kept[-1]):
                kept.pop()
            kept.append(point)
        thresholds = [0.0] + [1 / _slope(low, high) for low, high in pairwise(kept)]
        return (
            np.array([level for _, _, level in kept], dtype=np.int64),
            np.array([b for b, _, _ in kept]),
            np.array([e for _, e, _ in kept]),
            np.array(thresholds),
        )


def _slope(low: tuple[float, float, int], high: tuple[float, float, int]) -> float:
    """Noise saved per byte."""
    return (low[1] - high[1]) / max(high[0] - low[0], 1e-12)


@dataclass(frozen=True)
class Part:
    """Vectors of one kind: their energies and their rates."""

    energies: Floats  # any shape
    rates: Rates
    may_leave_out: bool

    @cached_property
    def hull(self) -> tuple[Ints, Floats, Floats, Floats]:
        """See :meth:`Rates.hull`."""
        return self.rates.hull(may_leave_out=self.may_leave_out)

    @cached_property
    def least_step(self) -> float:
        """The fewest bytes that make any vector finer."""
        _, sizes, _, _ = self.hull
        return float(np.diff(sizes).min(initial=np.inf))

    @cached_property
    def _sorted(self) -> tuple[Floats, Floats]:
        ascending = np.sort(self.energies, axis=None)
        return ascending, np.concatenate([[0.0], np.cumsum(ascending)])

    def cost(self, prices: Floats) -> tuple[Floats, Floats]:
        """Error and bytes at each price, every vector at its best precision."""
        _, sizes, noise, thresholds = self.hull
        ascending, sums = self._sorted
        starts = np.searchsorted(ascending, prices[:, None] * thresholds, side="right")
        starts[:, 0] = 0  # a price of 0 and energies of 0: still somewhere
        ends = np.concatenate([starts[:, 1:], np.full((len(prices), 1), len(ascending))], axis=1)
        ends = np.maximum(ends, starts)
        return ((sums[ends] - sums[starts]) * noise).sum(axis=1), ((ends - starts) * sizes).sum(axis=1)

    def levels(self, price: float) -> Ints:
        """The best level of every vector, in the shape of ``energies``."""
        levels, _, _, thresholds = self.hull
        place = np.searchsorted(price * thresholds[1:], self.energies, side="left")
        chosen: Ints = levels[place]
        return chosen

    def offers(self, levels: Ints) -> tuple[Floats, Floats, Ints]:
        """For every vector that can be made finer, what its next precision would bring.

        Returns:
            Gain per byte (n,), bytes (n,), and (row, column, level) (n, 3).
        """
        order, sizes, noise, _ = self.hull
        place = np.zeros(len(self.rates.bytes) + 1, dtype=np.int64)
        place[order] = np.arange(len(order))  # LEFT_OUT is -1: the last entry
        rows, columns = np.divmod(np.arange(levels.size), levels.shape[-1])
        now, energies = place[levels.reshape(-1)], self.energies.reshape(-1)
        able = (now + 1 < len(order)) & (energies > 0)
        now = now[able]
        extra = sizes[now + 1] - sizes[now]
        gain = energies[able] * (noise[now] - noise[now + 1])
        where = np.stack([rows[able], columns[able], order[now + 1]], axis=1)
        return gain / np.maximum(extra, 1e-9), extra, where

    def totals(self, levels: Ints) -> tuple[float, float]:
        """Error and bytes of given levels."""
        out = levels == LEFT_OUT
        noise = np.where(out, 1.0, self.rates.noise[levels])
        return float((self.energies * noise).sum()), float(np.where(out, 0.0, self.rates.bytes[levels]).sum())


@dataclass(frozen=True)
class Option:
    """One way to store one module, before a price has chosen levels.

    Args:
        family: Its name in the manifest.
        solution: Builds it.
        shared: The shared factors; each of their vectors is kept, at some precision.
        heads: (H, P) energies, descending along P: the directions of each head.
        base_error: Weighted squared error no level changes.
        groups: Which head each task uses, -1 for none; None is one each.
    """

    family: str
    solution: Family
    shared: tuple[Part, ...]
    heads: Part
    base_error: float
    groups: tuple[int, ...] | None = None
    rank: int = 0

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts."""
        return (*self.shared, self.heads)

    def at(self, bits: Sequence[int]) -> Option:
        """The same option with other precisions to choose from."""
        shared = tuple(replace(part, rates=part.rates.at(bits)) for part in self.shared)
        return replace(self, shared=shared, heads=replace(self.heads, rates=self.heads.rates.at(bits)))

    def cost(self, prices: Floats) -> tuple[Floats, Floats]:
        """Error and bytes at each price."""
        errors, sizes = np.full(len(prices), self.base_error), np.zeros(len(prices))
        for part in self.parts:
            error, size = part.cost(prices)
            errors += error
            sizes += size
        return errors, sizes

    @property
    def doubt(self) -> float:
        """What is added to the error when options of one module are compared.

        Energy that no head can reach, because it lies outside a shared factor's span, is what a task learned for
        itself. It costs more accuracy than as much energy truncated from within a task: measured on 12 fine-tuned
        classifiers, sharing that lowered the error by less than a tenth lost to separate truncation. Counted twice,
        it is on par or ahead at every size.
        """
        return self.base_error if self.shared else 0.0

    def choice(self, price: float) -> Choice:
        """The best levels at a price."""
        return Choice(
            self, Levels(tuple(part.levels(price) for part in self.shared), self.heads.levels(price))
        )

    def choice_or(self, price: float, other: Choice) -> Choice:
        """As :meth:`choice`, but ``other`` itself where that is the same one: its totals may be known already."""
        found = self.choice(price)
        same = other.option is self and all(
            np.array_equal(one, two)
            for one, two in zip(
                (*found.levels.shared, found.levels.heads),
                (*other.levels.shared, other.levels.heads),
                strict=True,
            )
        )
        return other if same else found


@dataclass(frozen=True)
class Choice:
    """An option and its levels: what one module stores."""

    option: Option
    levels: Levels

    @cached_property
    def _totals(self) -> tuple[float, float]:
        levels = (*self.levels.shared, self.levels.heads)
        totals = [part.totals(one) for part, one in zip(self.option.parts, levels, strict=True)]
        return self.option.base_error + sum(error for error, _ in totals), sum(size for _, size in totals)

    @property
    def error(self) -> float:
        """Expected weighted squared error."""
        return self._totals[0]

    @property
    def bytes(self) -> int:
        """Bytes of the factors."""
        return round(self._totals[1])

    @cached_property
    def offers(self) -> tuple[Floats, Floats, Ints]:
        """Of all parts, see :meth:`Part.offers`; where: (part, row, column, level)."""
        levels = (*self.levels.shared, self.levels.heads)
        found = [part.offers(one) for part, one in zip(self.option.parts, levels, strict=True)]
        ratios, sizes, places = zip(*found, strict=True)
        parts = np.repeat(np.arange(len(found)), [len(one) for one in places])
        where = np.concatenate([parts[:, None], np.concatenate(places)], axis=1)
        return np.concatenate(ratios), np.concatenate(sizes), where

    def kept(self, precisions: int) -> tuple[Ints, Ints]:
        """How many vectors are kept at each precision, (n, precisions): per shared factor, and per head (row)."""
        shared = [_row_counts(levels[None], precisions) for levels in self.levels.shared]
        heads = _row_counts(self.levels.heads, precisions)
        return np.concatenate([*shared, heads[:0]]), heads


def _row_counts(levels: Ints, precisions: int) -> Ints:
    width = precisions + 1  # LEFT_OUT is -1
    cells = levels + (np.arange(len(levels)) * width + 1)[:, None]
    counts: Ints = np.bincount(cells.reshape(-1), minlength=len(levels) * width).reshape(-1, width)[:, 1:]
    return counts


def trimmed(counts: Ints) -> tuple[tuple[int, ...], ...]:
    """Rows of counts as the manifest has them: zeros at the end left out."""
    return tuple(tuple(row[:end]) for row, end in zip(counts.tolist(), ends(counts).tolist(), strict=True))


def ends(counts: Ints) -> Ints:
    """How many counts of each row are left once zeros at its end are left out."""
    found: Ints = np.where(counts > 0, np.arange(1, counts.shape[1] + 1), 0).max(axis=1, initial=0)
    return found
