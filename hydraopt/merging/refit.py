"""Small steps all families share: directions on the output side, and fitting one factor to a rounded other one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hydraopt.merging.gpu_linalg import solved
from hydraopt.merging.option import StoredModule
from hydraopt.merging.problem import ModuleProblem, StoredSide, squared_errors
from hydraopt.precision import Block


def left_directions(problem: ModuleProblem, vectors: Tensor) -> Tensor:
    """``(Q_k vectors_k)^T``: directions of the output side as rows.

    Args:
        problem: The module.
        vectors: (K, r, p) in the coordinates of ``Q_k``.

    Returns:
        (K, p, d_out) in the work dtype.
    """
    combined = (problem.whiteners @ vectors).to(problem.ups.dtype)
    return combined.mT @ problem.ups.mT


def masked_solve(gram: Tensor, right: Tensor, kept: npt.NDArray[np.bool_]) -> Tensor:
    """Solve ``gram_k X_k = right_k`` over the kept directions; the others get zeros.

    Args:
        gram: (K, p, p), float64; rows and columns of directions left out are zero.
        right: (K, p, n), float64.
        kept: (K, p).
    """
    if gram.shape[1] == 0:
        return right
    mask = torch.from_numpy(kept).to(gram.device)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    # A direction without energy may have rounded to nothing: it is left at zero too.
    empty = ~mask | (diagonal <= 0)
    size = diagonal.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    padded = gram + torch.diag_embed(torch.where(empty, size, 1e-12 * size))
    return solved(padded, right.masked_fill(empty[:, :, None], 0.0))


def stored_module(
    problem: ModuleProblem,
    shared: list[Block],
    heads: Sequence[list[list[Block]]],
    up: StoredSide,
    down: StoredSide,
) -> StoredModule:
    """Gather a module's blocks by file and measure its error.

    Args:
        problem: The module.
        shared: Blocks of the shared file.
        heads: Per factor, per task: its blocks.
        up: What the blocks decode to on the output side.
        down: And on the input side.
    """
    errors = squared_errors(problem, up, down).tolist()
    norms = problem.frobenius.tolist()
    return StoredModule(
        shared,
        {task: [block for factor in heads for block in factor[k]] for k, task in enumerate(problem.tasks)},
        dict(zip(problem.tasks, errors, strict=True)),
        dict(zip(problem.tasks, norms, strict=True)),
    )
