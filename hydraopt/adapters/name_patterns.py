"""Patterns for module names, as PEFT's settings give them, and none that would keep the reader busy for ever."""

from __future__ import annotations

import re

import regex

from hydraopt.errors import AdapterFormatError

_PATIENCE_S = 2.0  # an honest pattern takes microseconds; nested repeats may take longer than anybody waits


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression of :mod:`re` matches the whole of a module's name.

    Raises:
        re.error: If it is no regular expression.
        AdapterFormatError: If it takes too long.
    """
    re.compile(pattern)  # PEFT's library is the judge of what a pattern is; only the other one can be stopped
    try:
        return regex.fullmatch(pattern, name, timeout=_PATIENCE_S) is not None
    except TimeoutError:
        raise AdapterFormatError(
            f"the pattern {pattern[:100]!r} takes more than {_PATIENCE_S:.0f} s to compare with {name[:100]!r}: "
            "write it without repeats inside repeats"
        ) from None
