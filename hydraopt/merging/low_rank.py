"""The update of one linear module as two thin factors, and its best approximation of a lower rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hydraopt.errors import AdapterMismatchError, BudgetError
from hydraopt.finite import all_finite


class LowRank(NamedTuple):
    """The update ``up @ down`` of one linear module, any LoRA scaling folded in."""

    up: Tensor  # (d_out, r)
    down: Tensor  # (r, d_in)

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def rank(self) -> int:
        """Inner size r."""
        return self.up.shape[1]


def checked(updates: Sequence[LowRank], weights: Sequence[float]) -> list[LowRank]:
    """The updates in one work dtype: float64 if any factor is, else float32.

    Args:
        updates: n >= 1 updates of one module; ranks may differ.
        weights: n finite coefficients.

    Raises:
        AdapterMismatchError: If the counts or shapes differ, or a factor holds NaN or infinite numbers.
        BudgetError: If a weight is not finite.
    """
    if not updates or len(updates) != len(weights):
        raise AdapterMismatchError(
            f"got {len(updates)} updates and {len(weights)} weights; give one weight for each, at least one"
        )
    for index, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise BudgetError(f"weight {index} is {weight}; weights must be finite numbers")
    for index, update in enumerate(updates):
        if update.up.ndim != 2 or update.down.ndim != 2 or update.rank != update.down.shape[0]:
            raise AdapterMismatchError(
                f"update {index}: factors of {tuple(update.up.shape)} and {tuple(update.down.shape)} "
                "are not (d_out, r) and (r, d_in)"
            )
        if update.shape != updates[0].shape:
            raise AdapterMismatchError(
                f"update {index} changes a weight of {update.shape}, but update 0 one of {updates[0].shape} "
                "(d_out, d_in). Were both trained on the same base model?"
            )
        if not all(all_finite(factor) for factor in update):
            raise AdapterMismatchError(f"update {index} holds NaN or infinite numbers")
    dtype = torch.float32
    for factor in (factor for update in updates for factor in update):
        dtype = torch.promote_types(dtype, factor.dtype)
    return [LowRank(update.up.to(dtype), update.down.to(dtype)) for update in updates]


def target_rank(updates: Sequence[LowRank], rank: int | None) -> int:
    """The asked rank, or the largest of the updates.

    Raises:
        BudgetError: If it is below 1.
    """
    if rank is None:
        return max(update.rank for update in updates)
    if rank < 1:
        raise BudgetError(f"rank={rank}: a merged update needs at least rank 1")
    return rank


def check_space(space: str) -> None:
    """Refuse anything but the two spaces a baseline can work in.

    Raises:
        BudgetError: For another name.
    """
    if space not in {"factors", "dw"}:
        raise BudgetError(f"on={space!r}: a baseline merges on 'factors' (A and B apart) or on 'dw'")


def padded(updates: Sequence[LowRank]) -> list[LowRank]:
    """The updates with zero rows and columns up to the largest rank among them; their products do not change."""
    largest = target_rank(updates, None)
    return [
        LowRank(
            torch.nn.functional.pad(update.up, (0, largest - update.rank)),
            torch.nn.functional.pad(update.down, (0, 0, 0, largest - update.rank)),
        )
        for update in updates
    ]


def compressed(update: LowRank, rank: int) -> LowRank:
    """Best approximation of ``up @ down`` of rank at most ``rank`` (Eckart & Young, Psychometrika 1936).

    Two thin QRs reduce its SVD to one of the inner size R: O((d_out + d_in) R^2) work, never a (d_out, d_in)
    matrix. The small SVD is done in float64.

    Args:
        update: Factors of any inner size R.
        rank: Directions to keep, at least 1; the result has fewer where R, d_out or d_in is smaller.

    Returns:
        Factors in the dtype of ``update``, singular values split evenly between them. Exact when ``rank`` reaches
        the rank of the product.
    """
    q_up, r_up = torch.linalg.qr(update.up)
    q_down, r_down = torch.linalg.qr(update.down.mT)
    left, sigma, right = torch.linalg.svd(r_up.double() @ r_down.double().mT, full_matrices=False)
    root = sigma[:rank].sqrt()
    dtype = update.up.dtype
    return LowRank(
        q_up @ (left[:, :rank] * root).to(dtype), (root[:, None] * right[:rank]).to(dtype) @ q_down.mT
    )
