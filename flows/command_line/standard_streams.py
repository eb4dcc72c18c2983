"""Standard streams of a process that was started without them."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Have stdout and stderr lead nowhere where there is none: every print would fail."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
