"""What is minimised: the weighted error of one linear module over all tasks, in small coordinates.

For module l the tasks ask for ``dW_k = B_k A_k``. With ``B_k^T B_k = E diag(e) E^T`` let
``core_k = diag(e)^(1/2) E^T`` and ``Q_k = B_k E diag(e)^(-1/2)``, so that ``Q_k^T Q_k = I``,
``B_k = Q_k core_k`` and ``|dW_k| = |T_k|`` with ``T_k = core_k A_k`` (r_k, d_in). Everything a family of
factors needs is in the ``T_k``; no (d_out, d_in) matrix is ever formed.

With calibration data the error of a task is measured on the inputs it will see: ``|dW C^(1/2)|`` with the second
moment ``C`` (d_in, d_in) of the module's inputs. Then ``C`` stands between any two vectors of the input side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.errors import AdapterMismatchError
from hydraopt.merging.factor_stacks import read_scaled, tasks_with
from hydraopt.merging.gpu_linalg import start
from hydraopt.merging.kept_factors import KeptFactors
from hydraopt.merging.small_eigen import eigh

SMALL_PROBLEM = 1 << 21
"""Numbers in all factors of one module up to which float64 costs nothing one would notice."""

_LITTLE = 1e-4
"""Share of a squared norm: float32 sums of millions of numbers are wrong by 5e-7 of it at most, measured."""


@dataclass(frozen=True)
class Grams:
    """Products of the factors with themselves, as kept from one reading of a module to the next.

    In the work dtype they were multiplied in, which loses nothing; the same tasks in the same order.
    """

    up: Tensor  # (K, r, r): B_k^T B_k
    down: Tensor  # (K, r, r): A_k C A_k^T


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
    ranks: tuple[int, ...]  # r_k before padding
    metric: Tensor | None = None  # (d_in, d_in): C, None for the identity
    is_bfloat16: bool = False  # whether every number of the factors but the scaling is a bfloat16
    known: Grams | None = None  # from an earlier reading

    @property
    def d_out(self) -> int:
        """Size of the module's output."""
        return self.ups.shape[1]

    @property
    def d_in(self) -> int:
        """Size of the module's input."""
        return self.downs.shape[2]

    @cached_property
    def grams(self) -> Grams:
        """Products of the factors with themselves."""
        return self.known or Grams(self.ups.mT @ self.ups, self.downs @ self.measured_downs.mT)

    @cached_property
    def up_gram(self) -> Tensor:
        """``B_k^T B_k`` (K, r, r), float64."""
        return self.grams.up.double()

    @cached_property
    def down_gram(self) -> Tensor:
        """``A_k C A_k^T`` (K, r, r), float64."""
        return self.grams.down.double()

    @cached_property
    def measured_downs(self) -> Tensor:
        """``A_k C`` (K, r, d_in)."""
        return self.downs if self.metric is None else self.downs @ self.metric.to(self.downs.dtype)

    @cached_property
    def norms(self) -> Tensor:
        """``|dW_k|^2`` in the metric, (K,) in float64."""
        return (self.up_gram * self.down_gram).sum(dim=(1, 2)).clamp_min(0)

    @cached_property
    def frobenius(self) -> Tensor:
        """``|dW_k|^2`` without the metric, (K,) in float64."""
        if self.metric is None:
            return self.norms
        return (self.up_gram * (self.downs @ self.downs.mT).double()).sum(dim=(1, 2)).clamp_min(0)

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(self.up_gram)  # ascending
        # Rounding noise of the Gram matrix. Clamped, not dropped: Q_k core_k = B_k holds for any positive values.
        floor = values[:, -1:].clamp_min(0) * 8 * torch.finfo(self.ups.dtype).eps
        return torch.maximum(values, floor).sqrt(), vectors

    @cached_property
    def cores(self) -> Tensor:
        """``core_k`` (K, r, r), float64: ``B_k = Q_k core_k``."""
        root, vectors = self._roots
        return root[:, :, None] * vectors.mT

    @cached_property
    def whiteners(self) -> Tensor:
        """(K, r, r), float64: ``Q_k = B_k whitener_k``."""
        root, vectors = self._roots
        inverse = torch.where(root > 0, 1 / root.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return vectors * inverse[:, None, :]

    @cached_property
    def rows_gram(self) -> Tensor:
        """``T_k C T_k^T`` (K, r, r), float64."""
        return self.cores @ self.down_gram @ self.cores.mT

    def mirror(self) -> ModuleProblem:
        """The transposed problem: inputs become outputs. Only without a metric.

        Raises:
            ValueError: If there is a metric; it belongs to the input side.
        """
        if self.metric is not None:
            raise ValueError("a problem with a metric has no mirror image")
        known = Grams(self.grams.down, self.grams.up)
        return replace(self, ups=self.downs.mT, downs=self.ups.mT, known=known)


def module_names(adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """All modules any adapter updates, sorted."""
    return tuple(sorted({name for adapter in adapters.values() for name in adapter.modules}))


def load_module(
    name: str,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    device: torch.device,
    metric: Tensor | None = None,
    *,
    known: Grams | None = None,
    kept: KeptFactors | None = None,
) -> ModuleProblem:
    """Read one module of all adapters that have it.

    Args:
        name: The module.
        adapters: By task name.
        weights: w_k by task name.
        device: Where to compute.
        metric: Second moment of the module's inputs (d_in, d_in), or None.
        known: Products of the same factors, from an earlier reading.
        kept: Where the factors of this set are kept on the device, if they are.

    Raises:
        AdapterMismatchError: If the metric is of another size.
    """
    start(device)
    tasks = tasks_with(name, adapters)
    specs = [adapters[task].modules[name] for task in tasks]
    if metric is not None and metric.shape != (specs[0].d_in, specs[0].d_in):
        raise AdapterMismatchError(
            f"module {name!r}: its adapters take {specs[0].d_in} inputs, but the calibration data have "
            f"{tuple(metric.shape)}. Were both made with the same base model?"
        )
    numbers = sum(spec.numbers for spec in specs)
    dtype = torch.float64 if numbers <= SMALL_PROBLEM else torch.float32
    if kept is None:
        ups, downs, is_bfloat16 = read_scaled(name, [adapters[task] for task in tasks], dtype, device)
    else:
        raw = kept.factors(name)
        ups, downs = raw.scaled(dtype)
        is_bfloat16 = raw.is_bfloat16
    return ModuleProblem(
        name,
        tasks,
        torch.tensor([weights[task] for task in tasks], dtype=torch.float64),
        ups=ups,
        downs=downs,
        ranks=tuple(spec.rank for spec in specs),
        metric=None if metric is None else metric.to(device, dtype),
        is_bfloat16=is_bfloat16 and dtype == torch.float32,
        known=known,
    )


def principal_directions(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors of some small Gram matrices, and the square roots of their singular values.

    Args:
        gram: (K, r, r), float64, positive semi-definite.
        count: Directions to return, at most r.

    Returns:
        Vectors (K, r, count), strongest first; and ``sigma^(1/2)`` (K, count) to split between two factors, one
        where a direction has no energy: a finite scale, which the product of the factors does not depend on.
    """
    values, vectors = eigh(gram)
    sigma = values.flip(-1)[:, :count].clamp_min(0).sqrt()
    largest = sigma[:, :1] if count else sigma
    root = torch.maximum(sigma, 1e-12 * largest).sqrt()
    return vectors.flip(-1)[:, :, :count], torch.where(root > 0, root, torch.ones_like(root))


@dataclass(frozen=True)
class StoredSide:
    """One side of a stored approximation ``D_k = L_k R_k``: ``L_k^T``, or ``R_k``, is ``inner_k rows_k``.

    With its products with the wanted ``B_k^T`` or ``A_k``, called X_k here, and with itself, multiplied in the work
    dtype.
    """

    rows: Tensor  # (q, d) for all tasks, or (K, q, d)
    inner: Tensor | None  # (K, p, q); None is the identity, p = q
    cross: Tensor  # (K, r, p), float64: X_k rows_k^T inner_k^T
    gram: Tensor  # (K, p, p), or (1, p, p) for all tasks, float64: inner_k rows_k rows_k^T inner_k^T

    def exact(self, wanted: Tensor) -> StoredSide:
        """The same with its products multiplied in float64; ``wanted`` are the X_k, (K, r, d)."""
        cross = _products(wanted, self.rows)
        own = self.rows if self.rows.dim() == 3 else self.rows[None]  # what tasks share is multiplied once
        gram = _products(own, own)
        if self.inner is not None:
            inner = self.inner.double()
            cross, gram = cross @ inner.mT, inner @ gram @ inner.mT
        return StoredSide(self.rows, self.inner, cross, gram)


def squared_errors(problem: ModuleProblem, up: StoredSide, down: StoredSide) -> Tensor:
    """``|dW_k - L_k R_k|^2`` per task, Frobenius, (K,) in float64.

    ``|dW - D|^2 = |dW|^2 - 2 <dW, D> + |D|^2`` with every product taken in small coordinates. Where little is left of
    the three, sums in float32 do not tell how little: then they are taken again in float64.
    """
    errors = _squared_errors(problem.frobenius, up, down)
    if problem.ups.dtype == torch.float64 or not bool((errors < _LITTLE * problem.frobenius).any()):
        return errors
    wanted = problem.ups.mT, problem.downs
    norms = (_products(wanted[0], wanted[0]) * _products(wanted[1], wanted[1])).sum(dim=(1, 2))
    return _squared_errors(norms, up.exact(wanted[0]), down.exact(wanted[1]))


def _squared_errors(norms: Tensor, up: StoredSide, down: StoredSide) -> Tensor:
    inner = (up.cross * down.cross).sum(dim=(1, 2))
    own = (up.gram * down.gram).sum(dim=(1, 2))
    return (norms - 2 * inner + own).clamp_min(0)


def _products(left: Tensor, right: Tensor) -> Tensor:
    """``left_k right_k^T`` in float64, some tasks at a time; ``left`` (K, n, d), ``right`` (m, d) or (K, m, d)."""
    step = max(1, SMALL_PROBLEM // max(left[0].numel(), 1))
    parts = []
    for first in range(0, len(left), step):
        own = slice(first, first + step)
        parts.append(left[own].double() @ (right if right.dim() == 2 else right[own]).double().mT)
    return torch.cat(parts)
