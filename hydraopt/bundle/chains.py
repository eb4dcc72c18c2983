"""What a bundle stores of one module and task: a chain of matrices whose product, left to right, is the update."""

from __future__ import annotations

import torch
from torch import Tensor

from hydraopt.bundle.layout import Counts, ModuleEntry
from hydraopt.bundle.stored_rows import Link, StoredRows

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


def chain_of(
    module: ModuleEntry, counts: Counts, own: list[Tensor], common: list[Tensor]
) -> tuple[Tensor, ...]:
    """The stored vectors as matrices whose product is the update; see the table in ``layout``."""
    d_out, d_in = module.shape
    if not any(counts):
        dtype = own[0].dtype if own else torch.float32
        return torch.empty(d_out, 0, dtype=dtype), torch.empty(0, d_in, dtype=dtype)
    if module.family == "separate":
        return own[0].mT, own[1]
    if module.family == "shared-a":
        return own[0].mT, own[1], common[0]
    if module.family == "shared-b":
        return common[0].mT, own[1].mT, own[0]
    if module.family == "two-sided":
        return common[1].mT, own[0].float().mT @ own[1].float(), common[0]
    return own[0].mT, common[0]


def links_of(family: str, own: list[StoredRows], common: list[StoredRows]) -> tuple[Link, ...]:
    """The same from right to left, as an input meets it."""
    order = {
        "separate": lambda: [(own[1], False), (own[0], True)],
        "shared-a": lambda: [(common[0], False), (own[1], False), (own[0], True)],
        "shared-b": lambda: [(own[0], False), (own[1], True), (common[0], True)],
        "two-sided": lambda: [(common[0], False), (own[1], False), (own[0], True), (common[1], True)],
        "dense-heads": lambda: [(common[0], False), (own[0], True)],
    }[family]()
    return tuple(Link(rows, up) for rows, up in order)
