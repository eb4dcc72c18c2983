"""What has to be minded of linear algebra on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Lock

import torch
from torch import Tensor

_starting, _solving = Lock(), Lock()
_started: set[torch.device] = set()


def start(device: torch.device) -> None:
    """Make a GPU's linear algebra ready, once for all threads.

    torch loads it at its first use, and fails where two threads are the first ("lazy wrapper should be called at most
    once").
    """
    if device.type != "cuda":
        return
    with _starting:
        if device not in _started:
            torch.linalg.inv(torch.ones(1, 1, device=device))
            _started.add(device)


def solved(matrices: Tensor, right: Tensor) -> Tensor:
    """``X`` with ``matrices X = right``, one thread at a time.

    On a GPU torch 2.11 solves batches wrongly, and says nothing, while another thread uses its linear algebra: seen
    in one of a few hundred.
    """
    with _solving if matrices.device.type == "cuda" else nullcontext():
        found: Tensor = torch.linalg.solve(matrices, right)
    return found
