"""YAML files people write: read strictly, with errors that name the file, the field and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hydraopt.errors import TaskFileError

_MAX_FILE_BYTES = 250_000  # thousands of labels; PyYAML reads some 100 kB a second
_MAX_VALUES = 100_000  # with every alias written out
_LONGEST_NUMBER = 100  # characters; in base 60, as in 1:30:00, a long one takes seconds to compute
_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


class _StrictLoader(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys without a word, and anything for a number or a text; we do not."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > _MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"its aliases stand for more than {_MAX_VALUES:,} values", node.start_mark
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag in _NUMBERS and len(str(node.value)) > _LONGEST_NUMBER:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number has more than {_LONGEST_NUMBER} characters", node.start_mark
            )
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as reason:
            # How PyYAML fails on `!!int ""`, `!!bool maybe`, `!!set [1]` or 1:1:...:1.5.
            raise yaml.constructor.ConstructorError(
                None, None, f"this is no {node.tag.rpartition(':')[2]}", node.start_mark
            ) from reason

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        str(value).encode()  # half a character, as "\ud800" writes one, is no text
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            key = key_node.value
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, str) and key != "<<":  # merge keys may repeat
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for with every alias written out; a node inside itself counts as too many."""
    if id(node) not in known:
        known[id(node)] = _MAX_VALUES + 1
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds.

    Raises:
        TaskFileError: If it cannot be read, is not YAML, names a key twice, or holds no mapping.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise TaskFileError(f"{path}: {path.stat().st_size:,} bytes is too large for a file of settings")
        data = path.read_bytes()
    except OSError as reason:
        raise TaskFileError(f"{path}: cannot be read ({reason.strerror})") from reason
    try:
        value = yaml.load(data, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        raise TaskFileError(f"{path}: not YAML: {' '.join(str(reason).split())}") from reason
    if not isinstance(value, dict):
        raise TaskFileError(f"{path}: expected `key: value` lines, found {type(value).__name__}")
    return value


def explain(reason: ValidationError) -> str:
    """Every fault in one line: field, what is wrong, the value found."""
    return "; ".join(_explain_one(dict(error)) for error in reason.errors(include_url=False))


def _explain_one(error: dict[str, Any]) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "missing":
        return f"{field} is missing"
    if error["type"] == "extra_forbidden":
        return f"{field} is not a known key"
    message = str(error["msg"]).removeprefix("Value error, ")
    value = error["input"]
    if not error["loc"] or isinstance(value, dict):
        return f"{field}: {message}"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
    hint = "; YAML reads yes, no, on, off and bare numbers as values, so put it in quotes"
    return f"{field}: {message}, found {shown}{hint if error['type'] == 'string_type' else ''}"
