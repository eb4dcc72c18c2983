"""Standard streams that were closed before we started, or that take nothing more."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

NOBODY_READS = 141
"""Exit code of a command whose reader left, as of a program that SIGPIPE ended."""


def open_closed_streams() -> None:
    """Have stdin, stdout and stderr lead nowhere where there is none.

    Every print would fail, and the next file that is opened would get the number of one: what C code prints would
    land in it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


def lead_nowhere(stream: TextIO) -> None:
    """Drop what a stream did not take: Python would try again at its end, and complain."""
    with suppress(OSError, ValueError):  # a test's has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
