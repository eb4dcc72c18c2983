"""What is minimised: the weighted error of one linear module over all tasks, in small coordinates.

For module l the tasks ask for ``dW_k = B_k A_k``. With ``B_k^T B_k = E diag(e) E^T`` let
``core_k = diag(e)^(1/2) E^T`` and ``Q_k = B_k E diag(e)^(-1/2)``, so that ``Q_k^T Q_k = I``,
``B_k = Q_k core_k`` and ``|dW_k| = |T_k|`` with ``T_k = core_k A_k`` (r_k, d_in). Everything a family of
factors needs is in the ``T_k``; no (d_out, d_in) matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hydraopt.adapters import Adapter

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SMALL_PROBLEM = 1 << 21
"""Numbers in all factors of one module up to which float64 costs nothing one would notice."""


@dataclass(frozen=True)
class ModuleProblem:
    """One linear module of all tasks that update it, scaling folded into ``ups``.

    K tasks, ranks padded with zeros to the largest r. Work dtype is float64 for small modules, else float32.
    """

    name: str
    tasks: tuple[str, ...]  # sorted
    weights: Tensor  # (K,), float64: w_k of the error
    ups: Tensor  # (K, d_out, r): B_k
    downs: Tensor  # (K, r, d_in): A_k
    whiteners: Tensor  # (K, r, r): E diag(e)^(-1/2); Q_k = B_k whitener_k
    rows: Tensor  # (K, r, d_in): T_k
    ranks: tuple[int, ...]  # r_k before padding

    @property
    def d_out(self) -> int:
        """Size of the module's output."""
        return self.ups.shape[1]

    @property
    def d_in(self) -> int:
        """Size of the module's input."""
        return self.downs.shape[2]

    @cached_property
    def norms(self) -> Tensor:
        """Squared Frobenius norms |dW_k|^2, (K,) in float64."""
        norms: Tensor = torch.linalg.vector_norm(self.rows, dim=(1, 2))
        return norms.double().square()


@dataclass(frozen=True)
class Factors:
    """What is stored for one module: one shared part and one part per task, in the stored dtype."""

    shared: tuple[Tensor, ...]
    heads: dict[str, tuple[Tensor, ...]]


class Family(Protocol):
    """A way to write the updates of one module."""

    def build(self, problem: ModuleProblem, ranks: Mapping[str, int], dtype: torch.dtype) -> Factors:
        """The stored factors once the ranks are chosen."""


@dataclass(frozen=True)
class Option:
    """One way to store one module, before the budget has chosen how many directions each task keeps.

    A task that keeps p directions costs ``p * direction_numbers``, or ``dense_numbers`` when its whole head is
    stored dense, and is left with ``base_error + energies[p:].sum()`` of weighted squared error.
    """

    family: str
    shared_rank: int
    shared_numbers: int
    direction_numbers: int
    dense_numbers: int | None
    base_error: Floats  # (K,)
    energies: Floats  # (K, r), descending per row
    solution: Family

    @property
    def dense_rank(self) -> int:
        """The rank that stands for a dense head."""
        return self.shared_rank


def module_names(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """All modules any adapter updates, sorted."""
    return tuple(sorted({name for adapter in adapters.values() for name in adapter.modules}))


def load_module(
    name: str, adapters: Mapping[str, Adapter], weights: Mapping[str, float], device: torch.device
) -> ModuleProblem:
    """Read one module of all adapters and reduce it.

    Args:
        name: The module.
        adapters: By task name.
        weights: w_k by task name.
        device: Where to compute.
    """
    tasks = tuple(sorted(task for task, adapter in adapters.items() if name in adapter.modules))
    specs = [adapters[task].modules[name] for task in tasks]
    numbers = sum(spec.rank * (spec.d_in + spec.d_out) for spec in specs)
    dtype = torch.float64 if numbers <= SMALL_PROBLEM else torch.float32
    rank = max(spec.rank for spec in specs)
    make = torch.empty if all(spec.rank == rank for spec in specs) else torch.zeros
    ups = make(len(tasks), specs[0].d_out, rank, dtype=dtype, device=device)
    downs = make(len(tasks), rank, specs[0].d_in, dtype=dtype, device=device)
    for k, (task, spec) in enumerate(zip(tasks, specs, strict=True)):
        up, down, scaling = adapters[task].parts(name)
        ups[k, :, : spec.rank].copy_(up).mul_(scaling)
        downs[k, : spec.rank].copy_(down)
    return reduce_module(
        name,
        tasks,
        torch.tensor([weights[task] for task in tasks], dtype=torch.float64),
        ups=ups,
        downs=downs,
        ranks=tuple(spec.rank for spec in specs),
    )


def reduce_module(
    name: str, tasks: Sequence[str], weights: Tensor, *, ups: Tensor, downs: Tensor, ranks: Sequence[int]
) -> ModuleProblem:
    """Whiten the output side: see the head of this file. ``ups`` (K, d_out, r), ``downs`` (K, r, d_in)."""
    gram = (ups.mT @ ups).double()
    values, vectors = torch.linalg.eigh(gram)  # ascending
    # Rounding noise of the Gram matrix. Clamped, not dropped: Q_k core_k = B_k holds for any positive values.
    floor = values[:, -1:].clamp_min(0) * 8 * torch.finfo(ups.dtype).eps
    root = torch.maximum(values, floor).sqrt()
    inverse = torch.where(root > 0, 1 / root.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    whiteners = (vectors * inverse[:, None, :]).to(ups.dtype)
    cores = (root[:, :, None] * vectors.mT).to(ups.dtype)
    return ModuleProblem(name, tuple(tasks), weights, ups, downs, whiteners, cores @ downs, tuple(ranks))


def truncated(problem: ModuleProblem, task: int, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-``rank`` factors of ``Q_k rows``, singular values split evenly between them.

    Args:
        problem: The module.
        task: Index of the task.
        rows: (r, n) matrix in the coordinates of ``Q_k``, float64.
        rank: Directions to keep, at most r.

    Returns:
        ``(d_out, rank)`` and ``(rank, n)`` in float64. Their product is the Eckart-Young optimum; exact at full rank.
    """
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    keep = vectors.flip(-1)[:, :rank]
    sigma = values.flip(-1)[:rank].clamp_min(0).sqrt()
    # A direction without energy still needs a finite scale: the product does not depend on it.
    root = torch.maximum(sigma, sigma.new_tensor(1e-12) * sigma.max()).sqrt() if rank else sigma
    root = torch.where(root > 0, root, torch.ones_like(root))
    whitener = problem.whiteners[task].double()
    up = problem.ups[task] @ (whitener @ keep * root).to(problem.ups.dtype)
    return up.double(), (keep / root).mT @ rows
