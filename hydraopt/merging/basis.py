"""The directions of the input side that all tasks of a module use most: candidates for the rows of ``A'``.

They are the top right singular vectors of the stacked ``sqrt(w_k) T_k``: the global optimum of
``sum_k w_k |dW_k - B'_k A'|^2`` over ``A'`` and dense heads (Eckart & Young, Psychometrika 1936), and the best start
for low-rank heads. Small stacks go through a full eigendecomposition of their Gram matrix, tall ones through block
subspace iteration with Rayleigh-Ritz (Halko, Martinsson & Tropp, SIAM Review 2011), whose work is linear in the
number of tasks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hydraopt.merging.problem import ModuleProblem
from hydraopt.merging.small_eigen import eigh

FULL_EIGH = 320
"""Stacked rows up to which the full eigendecomposition is as fast as the iteration."""

_OVERSAMPLING = 16
_SWEEPS = 3
"""They leave 1e-4 of the relative error at 32 of 128 rows and 4e-3 at 96, for adapters that share half their energy."""

_JITTER = 1e-7
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Basis:
    """Rows that span what the tasks use, the most important first.

    ``rows`` are orthonormal in the module's metric up to rounding; ``energies`` are the weighted squared norms
    ``sum_k w_k |T_k v|^2`` along them, descending.
    """

    rows: Tensor  # (n, d_in), in bfloat16 where the factors are, else in the work dtype
    energies: Tensor  # (n,), float64
    cross: Tensor  # (K, r, n), float64: A_k C rows^T

    @property
    def count(self) -> int:
        """How many rows."""
        return self.rows.shape[0]


def find_basis(problem: ModuleProblem, largest: int, *, exact: bool = False) -> Basis:
    """The leading directions of a module's input side.

    Args:
        problem: The module.
        largest: How many at most; fewer come back where the stack has a lower numerical rank.
        exact: Whether to take the full eigendecomposition whatever it costs.
    """
    stacked = problem.downs.shape[0] * problem.downs.shape[1]
    largest = min(largest, stacked, problem.d_in)
    if exact or stacked <= FULL_EIGH or 2 * (largest + _OVERSAMPLING) > stacked:
        return _by_gram(problem, largest)
    return _by_iteration(problem, largest)


def _weighted_cores(problem: ModuleProblem) -> Tensor:
    """``sqrt(w_k) core_k``: what the stacked ``A_k`` are multiplied by, (K, r, r) in float64."""
    return problem.cores * problem.weights.sqrt().to(problem.cores.device)[:, None, None]


def stacked_directions(problem: ModuleProblem) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), descending, and eigenvectors (K r, n) of the Gram matrix of the stacked ``sqrt(w_k) T_k``.

    Both in float64; what is rounding noise is left out.
    """
    tasks, rank, _ = problem.downs.shape
    gram = (problem.downs.flatten(0, 1) @ problem.measured_downs.flatten(0, 1).mT).double()
    cores = _weighted_cores(problem)
    half = (cores @ gram.view(tasks, rank, -1)).view(tasks * rank, tasks, rank).transpose(0, 1)  # core G
    full = (half @ cores.mT).transpose(0, 1).reshape(tasks * rank, tasks * rank)  # core G core^T
    values, vectors = eigh((full + full.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    noise = 8 * len(values) * torch.finfo(problem.downs.dtype).eps
    count = int((values > noise * values[:1].clamp_min(_TINY)).sum())
    return values[:count], vectors[:, :count]


def combined_rows(problem: ModuleProblem, combinations: Tensor) -> Tensor:
    """Combinations (n, K r) of the stacked ``sqrt(w_k) T_k``, in the work dtype: (n, d_in)."""
    tasks, rank, _ = problem.downs.shape
    on_stack = (combinations.view(len(combinations), tasks, 1, rank) @ _weighted_cores(problem)).flatten(1)
    return _precise_product(problem, on_stack.to(problem.downs.dtype), problem.downs.flatten(0, 1))


def _by_gram(problem: ModuleProblem, largest: int) -> Basis:
    tasks, rank, _ = problem.downs.shape
    values, vectors = (part[..., :largest] for part in stacked_directions(problem))
    rows = combined_rows(problem, (vectors / values.sqrt()).mT)
    rows = _rounded(problem, rows)
    cross = (problem.measured_downs.flatten(0, 1) @ rows.mT).double().view(tasks, rank, len(values))
    return Basis(compact(problem, rows), values, cross)


def _by_iteration(problem: ModuleProblem, largest: int) -> Basis:
    tasks, rank, _ = problem.downs.shape
    block = largest + _OVERSAMPLING
    cores = _weighted_cores(problem)
    stack = problem.downs.flatten(0, 1)
    measured = problem.measured_downs.flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(block, tasks * rank, generator=generator, dtype=cores.dtype).to(stack.device)
    for _ in range(_SWEEPS):
        on_stack = (mixed.view(block, tasks, 1, rank).transpose(0, 1).squeeze(2) @ cores).transpose(0, 1)
        span = _rounded(problem, on_stack.reshape(block, -1).to(stack.dtype) @ stack)
        measured_span = span if problem.metric is None else span @ problem.metric
        gram = (span @ measured_span.mT).double()
        gram.diagonal().add_(_JITTER * float(gram.diagonal().mean()))
        lower = torch.linalg.cholesky(gram)
        projected = (measured @ span.mT).view(tasks, rank, block).double()
        weighted = (cores @ projected).flatten(0, 1)
        # What the tasks use of orthonormal rows of the span.
        used = torch.linalg.solve_triangular(lower, weighted.mT, upper=False)
        values, rotation = eigh(used @ used.mT)
        # Of the next span each row is one direction at length 1, so that rounding drowns none of the weak ones.
        mixed = (rotation / values.clamp_min(_JITTER * float(values[-1])).clamp_min(_TINY)).mT @ used
    values, rotation = values.flip(-1)[:largest].clamp_min(0), rotation.flip(-1)[:, :largest]
    back = torch.linalg.solve_triangular(lower.mT, rotation, upper=True)  # orthonormal rows = back^T span
    rows = _precise_product(problem, back.mT.to(span.dtype), span)
    return Basis(compact(problem, rows), values, projected @ back)


def compact(problem: ModuleProblem, rows: Tensor) -> Tensor:
    """Rows as they are kept until the module is built; they will be rounded at least as much when stored."""
    return rows.bfloat16() if problem.is_bfloat16 else rows


def _rounded(problem: ModuleProblem, rows: Tensor) -> Tensor:
    """Rows that are bfloat16 numbers where the factors are: products of the two are then exact in either mode."""
    return rows.bfloat16().to(rows.dtype) if problem.is_bfloat16 else rows


def _precise_product(problem: ModuleProblem, small: Tensor, big: Tensor) -> Tensor:
    """``small @ big`` to float32 precision even where products of bfloat16 factors round their inputs to bfloat16.

    Args:
        problem: The module.
        small: Of any numbers.
        big: Of bfloat16 numbers where the problem's factors are.
    """
    if not problem.is_bfloat16:
        return small @ big
    high = small.bfloat16().float()
    return high @ big + (small - high) @ big
