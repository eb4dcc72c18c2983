"""How long work tells whoever waits how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with (how much is done, how much there is, what is being done)."""
