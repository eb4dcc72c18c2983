"""The paper's form, fitted step by step: a shared A' and dense heads, by Adam on the reconstruction error.

HydraOpt, arXiv 2507.17706, learns ``A'`` and the heads by minimising ``sum_k w_k |dW_k - B'_m(k) A'|^2``. Its
optimiser, start and stopping rule are not known to us; those here are ours and stand in :func:`gradient`. The closed
form reaches the optimum of the same error at once; this is what it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hydraopt.errors import AdapterMismatchError, BudgetError
from hydraopt.merging.low_rank import LowRank, checked, padded, target_rank

_TINY = 1e-300  # keeps a head that no task pays for at 0 instead of 0 / 0


class Fitted(NamedTuple):
    """Task k is approximated by ``heads[m(k)] @ shared``."""

    shared: Tensor  # (rank, d_in)
    heads: list[Tensor]  # M of (d_out, rank)
    errors: list[float]
    """Relative error sqrt(sum_k w_k |dW_k - fit|^2 / sum_k w_k |dW_k|^2) at the start and after every step."""


@dataclass(frozen=True)
class _Targets:
    """What the heads are fitted to: for head m the sum of its tasks' ``w_k dW_k``, as factors side by side."""

    ups: list[Tensor]  # M of (d_out, R_m), weights folded in
    downs: Tensor  # (R, d_in), the heads' blocks below one another, R = sum_m R_m
    weights: Tensor  # (M,): sum of the w_k of each head
    energies: Tensor  # (M,) in float64: sum of the w_k |dW_k|^2 of each head

    @property
    def sizes(self) -> list[int]:
        """R_m."""
        return [up.shape[1] for up in self.ups]


def gradient(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None = None,
    *,
    heads: Sequence[int],
    steps: int,
    learning_rate: float = 0.03,
    seed: int = 0,
    start: Literal["mean", "random"] = "mean",
    target_error: float | None = None,
) -> Fitted:
    r"""Fit :math:`A'` and heads by Adam to :math:`\sum_k w_k |dW_k - B'_{m(k)} A'|^2`.

    The gradients are exact and need no (d_out, d_in) matrix: with :math:`G = A'A'^T` and, per head, W the sum of its
    w_k and :math:`\bar U \bar D` the sum of its :math:`w_k dW_k`,

    .. math:: \partial B' = 2 (W B' G - \bar U (\bar D A'^T)), \quad
              \partial A' = 2 \sum_m (W B'^T B' A' - (B'^T \bar U) \bar D).

    So every step is the one that Adam on dense updates would take. Both parameters are scaled to entries of about 1:
    A' by ``1 / sqrt(d_in)``, a head by its tasks' root mean square; the learning rate has no unit, and updates twice
    as large give heads twice as large. Adam is torch's with its default moments and a constant rate.

    Start: heads at 0; A' at the mean of the tasks' A with rows of length 1, or at Gaussian rows from ``seed``, which
    also stand in for rows the mean does not have. The mean is a good start for adapters trained from one A, and like
    any use of a factor by itself it depends on how the updates are factorised.

    It stops after ``steps`` steps, or as soon as the error is at most ``target_error``.

    Args:
        updates: n >= 1 updates of one module, ``up`` (d_out, r_k), ``down`` (r_k, d_in).
        weights: n weights w_k >= 0 of the error, not all 0; ``1 / |dW_k|^2`` counts tasks alike.
        rank: Rows of A', None for the largest r_k.
        heads: Per task the index of its head; 0 .. M - 1, each used.
        steps: At most so many, at least 1.
        learning_rate: Above 0.
        seed: Of the random rows.
        start: ``mean`` or ``random``.
        target_error: Relative error that is enough.

    Returns:
        A', the heads and the course of the error, in float32, or float64 if an input is.

    Raises:
        AdapterMismatchError: If the updates do not fit together, hold NaN, or ``heads`` does not fit them.
        BudgetError: If a weight or setting is out of range, or all updates are zero.
    """
    updates = checked(updates, weights)
    rank = target_rank(updates, rank)
    _check_settings(weights, steps, learning_rate, start)
    targets = _gather(updates, weights, _members(heads, len(updates)))
    total = float(targets.energies.sum())
    if total <= 0:
        raise BudgetError("all updates of positive weight are zero: there is nothing to fit")
    d_out, d_in = updates[0].shape
    sizes = (targets.energies / targets.weights.double().clamp_min(_TINY) / (d_out * rank)).sqrt()
    head_scale = sizes.to(targets.downs.dtype)[:, None, None]
    shared_scale = d_in**-0.5
    first = _first_rows(updates, rank, seed, start) / shared_scale
    shared = torch.nn.Parameter(first)
    stack = torch.nn.Parameter(first.new_zeros(len(targets.ups), d_out, rank))
    adam = torch.optim.Adam([shared, stack], lr=learning_rate)
    errors = []
    with torch.no_grad():
        for step in range(steps + 1):
            lost, d_shared, d_heads = _loss(targets, shared * shared_scale, stack * head_scale)
            errors.append(math.sqrt(max(lost, 0.0) / total))
            if step == steps or (target_error is not None and errors[-1] <= target_error):
                break
            # In units of the whole energy: Adam's epsilon then means the same for small and large updates.
            shared.grad = d_shared * (shared_scale / total)
            stack.grad = d_heads * (head_scale / total)
            adam.step()
        fitted = stack * head_scale
        return Fitted((shared * shared_scale).detach(), list(fitted.detach()), errors)


def _loss(targets: _Targets, shared: Tensor, heads: Tensor) -> tuple[float, Tensor, Tensor]:
    """The weighted squared error, and its gradients for ``shared`` (r, d_in) and ``heads`` (M, d_out, r)."""
    gram = shared @ shared.mT
    met = torch.split(targets.downs @ shared.mT, targets.sizes)  # per head D A'^T, (R_m, r)
    wanted = torch.stack([up @ down for up, down in zip(targets.ups, met, strict=True)])
    own = (heads.mT @ heads) * targets.weights[:, None, None]  # (M, r, r)
    mixed = torch.cat([head.mT @ up for head, up in zip(heads, targets.ups, strict=True)], dim=1)  # (r, R)
    d_heads = 2 * (targets.weights[:, None, None] * (heads @ gram) - wanted)
    d_shared = 2 * (own.sum(0) @ shared - mixed @ targets.downs)
    met_heads = (heads.double() * wanted.double()).sum()
    lost = targets.energies.sum() - 2 * met_heads + (own.double() * gram.double()).sum()
    return float(lost), d_shared, d_heads


def _first_rows(updates: Sequence[LowRank], rank: int, seed: int, start: str) -> Tensor:
    """The start of A' (rank, d_in): rows of length 1 from the mean of the ``down``, about 1 where random."""
    down = updates[0].down
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(rank, down.shape[1], generator=generator, dtype=torch.float64) / math.sqrt(
        down.shape[1]
    )
    rows: Tensor = drawn.to(down.device, down.dtype)
    if start == "mean":
        mean = torch.stack([update.down for update in padded(updates)]).mean(0)[:rank]
        lengths = torch.linalg.vector_norm(mean, dim=1, keepdim=True)
        known = rows[: mean.shape[0]]
        known.copy_(torch.where(lengths > 0, mean / lengths.clamp_min(torch.finfo(mean.dtype).tiny), known))
    return rows


def _gather(
    updates: Sequence[LowRank], weights: Sequence[float], members: Sequence[Sequence[int]]
) -> _Targets:
    energies = [
        weight * float(((u.up.mT @ u.up).double() * (u.down @ u.down.mT).double()).sum())
        for u, weight in zip(updates, weights, strict=True)
    ]
    device, dtype = updates[0].up.device, updates[0].up.dtype
    return _Targets(
        [torch.cat([weights[k] * updates[k].up for k in tasks], dim=1) for tasks in members],
        torch.cat([updates[k].down for tasks in members for k in tasks]),
        torch.tensor([sum(weights[k] for k in tasks) for tasks in members], dtype=dtype, device=device),
        torch.tensor(
            [sum(energies[k] for k in tasks) for tasks in members], dtype=torch.float64, device=device
        ),
    )


def _members(heads: Sequence[int], count: int) -> list[list[int]]:
    """The tasks of every head.

    Raises:
        AdapterMismatchError: If ``heads`` does not give each task one of the heads 0 .. M - 1, all of them used.
    """
    if len(heads) != count or set(heads) != set(range(max(heads, default=-1) + 1)):
        raise AdapterMismatchError(
            f"heads={list(heads)}: give each of the {count} tasks a head; heads are numbered from 0 without a gap"
        )
    return [[task for task, head in enumerate(heads) if head == m] for m in range(max(heads) + 1)]


def _check_settings(weights: Sequence[float], steps: int, learning_rate: float, start: str) -> None:
    """Refuse settings that make no fit.

    Raises:
        BudgetError: For the first one.
    """
    if min(weights) < 0:
        raise BudgetError(f"weight {min(weights)}: the weights of an error must not be negative")
    if steps < 1:
        raise BudgetError(f"steps={steps}: a fit needs at least one step")
    if not 0 < learning_rate < math.inf:
        raise BudgetError(f"learning_rate={learning_rate}: it must be a positive number")
    if start not in {"mean", "random"}:
        raise BudgetError(f"start={start!r}: A' starts at 'mean' or 'random'")
