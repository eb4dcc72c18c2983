"""JSON that others wrote, read in one way: strictly, and with an error that names it.

Python's own reader keeps the last of two equal names, takes half a character for text, and reads values so deep
that whatever looks at them later ends in a RecursionError.
"""

from __future__ import annotations

import json
import re
from typing import Any

from hydraopt.errors import HydraoptError

_DEEPEST = 100  # levels; a bill of materials has 8
_HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # two of them may be a whole one


def parse_json(data: str | bytes, where: str, error: type[HydraoptError]) -> Any:
    """The value of a JSON text.

    Args:
        data: The text, or its bytes in UTF-8.
        where: What it is or where it stands, for the message.
        error: Class of the error to raise: it says what cannot be used.

    Raises:
        HydraoptError: Of the given class, if it is no JSON, names something twice in one object, nests more than 100
            levels deep, or holds text that is none.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_unique)
        if _HALF_A_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as reason:
        raise error(f"{where}: not JSON ({reason})") from reason
    if _is_too_deep(value):
        raise error(f"{where}: its values are nested more than {_DEEPEST} levels deep")
    return value


def parse_object(data: str | bytes, where: str, error: type[HydraoptError]) -> dict[str, Any]:
    """The object of a JSON text; arguments and errors as for :func:`parse_json`.

    Raises:
        HydraoptError: Of the given class, also if the value is none.
    """
    value = parse_json(data, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names stand once: of two, readers would not agree which counts."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [one for one in level if isinstance(one, dict | list)]
        if not level:
            return False
        level = [part for one in level for part in (one.values() if isinstance(one, dict) else one)]
    return True
