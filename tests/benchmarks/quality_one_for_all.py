"""One update for all tasks, the answer of most merging methods: each task keeps its own classifier.

Equal weights 1 / K and the rank of the adapters. TIES keeps a fifth of the entries at a scale of 1, as its paper does
where there are no validation data; DARE keeps half of them. No setting was searched for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hydraopt import Adapter
from hydraopt.merging.dare import dare, dare_ties
from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.task_arithmetic import task_arithmetic
from hydraopt.merging.ties import ties

Rule = Callable[[Sequence[LowRank], Sequence[float], int], LowRank]
"""From updates of one module, their weights and the seed of the module to one update."""

ONE_FOR_ALL: dict[str, Rule] = {
    "ta on dW": lambda updates, weights, _: task_arithmetic(updates, weights, on="dw"),
    "ta on factors": lambda updates, weights, _: task_arithmetic(updates, weights, on="factors"),
    "ties on dW": lambda updates, weights, seed: ties(updates, weights, density=0.2, on="dw", seed=seed),
    "ties on factors": lambda updates, weights, _: ties(updates, weights, density=0.2, on="factors"),
    "dare on dW": lambda updates, weights, seed: dare(updates, weights, density=0.5, seed=seed, on="dw"),
    "dare on factors": lambda updates, weights, seed: dare(
        updates, weights, density=0.5, seed=seed, on="factors"
    ),
    "dare-ties on dW": lambda updates, weights, seed: dare_ties(
        updates, weights, density=0.5, seed=seed, on="dw"
    ),
    "dare-ties on factors": lambda updates, weights, seed: dare_ties(
        updates, weights, density=0.5, seed=seed, on="factors"
    ),
}


def one_update(
    method: str, adapters: Mapping[str, Adapter]
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """The update of every module, in bfloat16, and the mean over the tasks of ``|dW - merged|^2 / |dW|^2``."""
    rule = ONE_FOR_ALL[method]
    weights = [1 / len(adapters)] * len(adapters)
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    lost, whole = dict.fromkeys(adapters, 0.0), dict.fromkeys(adapters, 0.0)
    names = sorted({name for adapter in adapters.values() for name in adapter.modules})
    for seed, name in enumerate(names):
        updates = {task: LowRank(*adapter.factors(name)) for task, adapter in adapters.items()}
        one = rule(list(updates.values()), weights, seed)
        up, down = one.up.to(torch.bfloat16), one.down.to(torch.bfloat16)
        merged[name] = (up, down)
        for task, update in updates.items():
            dense = update.up @ update.down
            lost[task] += float((dense - up.float() @ down.float()).square().sum())
            whole[task] += float(dense.square().sum())
    return merged, sum(lost[task] / whole[task] for task in adapters) / len(adapters)
