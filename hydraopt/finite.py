"""Whether numbers are numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite: in one pass and without a mask of the tensor's size."""
    if numbers.numel() == 0:
        return True
    least, most = torch.aminmax(numbers)  # either is NaN if any number is
    return math.isfinite(least.item()) and math.isfinite(most.item())
