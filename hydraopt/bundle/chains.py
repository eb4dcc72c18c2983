"""What a bundle stores of one module and task: a chain of matrices whose product, left to right, is the update."""

from __future__ import annotations

import torch
from torch import Tensor

Chain = tuple[Tensor, ...]
"""One, two or three matrices; the first has d_out rows, the last d_in columns."""


def chain_rank(chain: Chain) -> int:
    """The narrowest place of the chain: an upper bound of the product's rank."""
    return min(part.shape[0] for part in chain[1:])


def pair(chain: Chain) -> tuple[Tensor, Tensor]:
    """``(up, down)`` of the chain's rank with the chain's product; a middle factor is multiplied in, in float32."""
    if len(chain) == 2:
        return chain[0], chain[1]
    first, middle, last = chain
    if middle.shape[0] <= middle.shape[1]:
        return first, (middle.float() @ last.float()).to(last.dtype)
    return (first.float() @ middle.float()).to(first.dtype), last


def product(chain: Chain) -> Tensor:
    """The chain multiplied out, in float32: for vectors and prompts, whose product is what they are."""
    result = chain[0].float()
    for part in chain[1:]:
        result = result @ part.float()
    return result


def zero_chain(shape: tuple[int, int], dtype: torch.dtype) -> Chain:
    """A zero update of rank 1: PEFT cannot hold a rank of 0."""
    return torch.zeros(shape[0], 1, dtype=dtype), torch.zeros(1, shape[1], dtype=dtype)
