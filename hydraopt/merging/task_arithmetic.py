"""Task arithmetic: one update for all tasks, the weighted sum of theirs.

Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv 2212.04089.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hydraopt.merging.low_rank import LowRank, check_space, checked, compressed, target_rank
from hydraopt.merging.row_blocks import Space, merge_entries, weighted_sum


def task_arithmetic(
    updates: Sequence[LowRank], weights: Sequence[float], rank: int | None = None, *, on: Space = "dw"
) -> LowRank:
    r"""One update near :math:`\sum_k w_k dW_k`.

    On ``dw``: the best approximation of that sum of the asked rank. Stacked side by side the factors are one product
    of inner size :math:`\sum_k r_k`, which QR and a small SVD reduce exactly; it depends on the updates alone.

    On ``factors``, as PEFT's ``combination_type="linear"``: :math:`(\sum_k \sqrt{w_k} B_k)(\sum_k \sqrt{w_k} A_k)`.
    The cross terms :math:`B_j A_k` are no part of the wanted sum, and the result depends on how each update happens
    to be factorised. It equals PEFT's where all adapters have one scaling. Smaller ranks are padded with zeros.

    Args:
        updates: n >= 1 updates of one module, ``up`` (d_out, r_k), ``down`` (r_k, d_in).
        weights: n coefficients, used as given; ``1 / n`` each for the mean.
        rank: Of the result, None for the largest r_k; it is lower where the sum has fewer directions.
        on: ``dw`` or ``factors``.

    Returns:
        Factors in float32, or float64 if an input is.

    Raises:
        AdapterMismatchError: If the updates do not fit together or hold NaN.
        BudgetError: If a weight, ``rank`` or ``on`` is out of range.
    """
    check_space(on)
    if on == "factors":
        return merge_entries(
            updates,
            weights,
            rank,
            on=on,
            rule=lambda matrices, roots, _: weighted_sum(matrices, roots),
            seed=0,
        )
    updates = checked(updates, weights)
    stacked = LowRank(
        torch.cat([weight * update.up for update, weight in zip(updates, weights, strict=True)], dim=1),
        torch.cat([update.down for update in updates]),
    )
    return compressed(stacked, target_rank(updates, rank))
