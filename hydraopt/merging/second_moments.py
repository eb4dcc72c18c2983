"""Second moments of the inputs of modules: which directions of a module's input its data really use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hydraopt.adapters.tensor_file import TensorFile
from hydraopt.errors import TaskFileError

LEAST_SHRINKAGE = 0.05
"""Tokens of one text resemble one another, so the estimate below, which takes them for independent, is too small."""


class SecondMoments(Mapping[str, Tensor]):
    """``C`` (d_in, d_in) by module, in float32: kept in files and read one at a time, whenever it is asked for.

    Args:
        files: The safetensors file of each module; its tensor has the module's name.
        digest: SHA-256 (hex) of the data they were collected from.
    """

    def __init__(self, files: Mapping[str, Path], digest: str) -> None:
        self.digest = digest
        self._files = {name: TensorFile(path, TaskFileError) for name, path in files.items()}

    def __getitem__(self, module: str) -> Tensor:
        return self._files[module].read(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def regularised(moment: Tensor, fourth: float, tokens: int) -> Tensor:
    """A second moment that can serve as a metric: shrunk towards the identity, and of mean eigenvalue 1.

    ``C' = ((1 - a) C + a m I) / m`` with ``m = tr C / d``. With fewer tokens than directions ``C`` is singular: an
    error along a direction that these texts happen not to use would cost nothing, and be anything. The intensity
    ``a = min(1, b^2 / |C - m I|^2)``, ``b^2 = (sum_t |x_t|^4 / n - |C|^2) / n`` minimises the expected error of the
    estimate for independent tokens (Ledoit & Wolf, J. Multivariate Analysis 2004); it is at least
    :data:`LEAST_SHRINKAGE`. The scale is taken out because it says which modules have large inputs, not which matter;
    modules with and without a moment stay comparable.

    Args:
        moment: ``C = sum_t x_t x_t^T / n`` (d, d).
        fourth: ``sum_t |x_t|^4 / n``.
        tokens: n >= 1.

    Returns:
        (d, d) in float32; the identity if every input was zero.
    """
    size = len(moment)
    mean = float(moment.diagonal().double().sum()) / size
    identity = torch.eye(size, dtype=torch.float32)
    if mean <= 0:
        return identity
    squared = float(moment.double().square().sum()) if size <= 1024 else float(moment.norm().double()) ** 2
    spread = squared - size * mean**2  # |C - m I|^2
    noise = max(fourth - squared, 0.0) / tokens
    shrinkage = min(1.0, max(noise / spread, LEAST_SHRINKAGE)) if spread > 0 else 1.0
    return moment.float().mul((1 - shrinkage) / mean).add_(identity, alpha=shrinkage)
