"""The names people give to tasks, bundles, approvers and base models, and what is allowed in them."""

from __future__ import annotations

import re

from hydraopt.errors import HydraoptError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class UnsafeNameError(HydraoptError, ValueError):
    """A name that could escape its folder, hide in a log or break a key."""


def check_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it is safe as a file name, an object key part and a registry name.

    Allowed: 1 to 100 ASCII letters, digits, ``.``, ``_`` and ``-``, starting with a letter or digit,
    without ``..``. So no ``/``, no control character, nothing invisible.

    Raises:
        UnsafeNameError: If the name breaks the rule; the message quotes it with escapes visible.
    """
    check_text(name, what)
    if not _NAME.fullmatch(name) or ".." in name:
        raise UnsafeNameError(
            f"{what} {name!r} is not allowed: use 1 to 100 letters, digits, '.', '_' or '-', "
            "starting with a letter or digit, without '..'"
        )
    return name


def check_text(name: object, what: str) -> None:
    """Refuse a name that is no string.

    Raises:
        UnsafeNameError: If it is something else.
    """
    if not isinstance(name, str):
        raise UnsafeNameError(f"{what} must be a string, not {name!r}")


def check_task_name(name: str) -> str:
    """Return ``name`` if it may name a task; see :func:`check_name`."""
    return check_name(name, "task name")


def slug(name: str) -> str:
    """``name`` in lower case with every run of other characters than ``a-z0-9.-`` made one ``-``."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower()).strip("-")
