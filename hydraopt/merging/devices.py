"""Where a merge computes: the CPU, or a GPU with what has to be minded of it."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Lock

import torch
from torch import Tensor

from hydraopt.errors import BudgetError

_starting, _solving = Lock(), Lock()
_started: set[torch.device] = set()


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one.

    Raises:
        BudgetError: If there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in {"cpu", "cuda"}:
        raise BudgetError(f"device={name!r}: use 'auto', 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise BudgetError("device='cuda': this machine shows no CUDA device; use 'auto' or 'cpu'")
    return torch.device(name)


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
