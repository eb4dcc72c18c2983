"""Decoupled decay of the nuclear norm: adapters that end with a low rank of their own, which is what merges well.

After every step of the optimiser each singular value of each B is lowered by ``decay * learning rate``, to zero at
least: the proximal step of the nuclear norm (singular value soft-thresholding, Cai, Candes and Shen, arXiv 0810.3286),
kept apart from Adam's as AdamW keeps weight decay. What a task learned in earnest stands far above what is taken off;
the flat remainder that Adam's even steps leave in every direction vanishes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from hydraopt.finite import all_finite


class NuclearDecay(TrainerCallback):  # type: ignore[misc]  # untyped library
    """Lowers the singular values of every B after each step.

    Args:
        decay: What a step takes off a singular value, over the step's learning rate.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._rate = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Note the rate of this step; afterwards the schedule is a step further."""
        self._rate = given["lr_scheduler"].get_last_lr()[0]

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Lower what the step left."""
        taken = self._decay * self._rate
        with torch.no_grad():
            for name, parameter in given["model"].named_parameters():
                if ".lora_B." in name or ".lora_embedding_B." in name:
                    parameter.copy_(soft_threshold(parameter, taken))


def soft_threshold(matrix: Tensor, taken: float) -> Tensor:
    """``U max(S - taken, 0) V^T`` of ``matrix = U S V^T``.

    Args:
        matrix: (m, n); cheapest where one side is short, as a factor's is.
        taken: Taken off every singular value.

    Returns:
        (m, n), of the same dtype; as it is if it holds NaN or infinity. Singular values below 1e-6 of the largest
        count as zero: they are taken from a Gram matrix in float64, which the few directions of a factor allow.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return soft_threshold(matrix.T, taken).T
    if not all_finite(matrix):
        return matrix  # a training that diverged; it ends by itself, and says so
    tall = matrix.double()
    energies, directions = torch.linalg.eigh(tall.T @ tall)
    values = energies.clamp_min(0).sqrt()
    kept = values > max(taken, 1e-6 * float(values[-1]))
    shrunk = torch.where(kept, 1 - taken / values.where(kept, torch.ones_like(values)), 0.0)
    lowered: Tensor = tall @ (directions * shrunk) @ directions.T
    return lowered.to(matrix.dtype)
