"""Where to compute: a device by its name."""

from __future__ import annotations

import re

import torch

from hydraopt.errors import DeviceError

_NAMES = re.compile(r"auto|cpu|cuda(:\d+)?")


def find_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Args:
        name: "auto" (the GPU where there is one, else the CPU), "cpu", "cuda", or "cuda:1" for the second GPU; or
            torch's own word for one.

    Raises:
        DeviceError: If there is no such device here.
    """
    name = str(name)
    if not _NAMES.fullmatch(name):
        raise DeviceError(f"device {name!r} is not known; use auto, cpu or cuda")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise DeviceError(
            f"device {name!r} was asked for, but torch sees {gpus or 'no'} GPU here; use auto or cpu"
        )
    return device
