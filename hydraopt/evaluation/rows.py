"""Labelled examples: reading them from files and data sets, checking them, and their canonical bytes.

A classification row is ``{"text", "label"}``; a generation row is ``{"input", "target"}``, with
``"targets"`` where several references are right (``target`` is the first of them).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets

from hydraopt.base_models import quiet
from hydraopt.errors import TaskFileError, first_line
from hydraopt.json_text import parse_object

Row = dict[str, Any]
Kind = Literal["classification", "generation"]

MAX_ROWS = 1_000_000
MAX_CHARACTERS = 200_000
MAX_REFERENCES = 100


def read_json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each object of a ``.jsonl`` or ``.jsonl.gz`` file with where it stands ("FILE, line N").

    Read here rather than with ``datasets.load_dataset``: that one turns a column of texts that look like
    dates into time stamps, and cannot say which line is wrong.

    Raises:
        TaskFileError: If the file cannot be read, or a line is not a JSON object.
    """
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path} (JSON lines), line {number}"
                    yield where, parse_object(line, where, TaskFileError)
    except UnicodeDecodeError as reason:
        raise TaskFileError(f"{path}: not UTF-8 text ({reason.reason} at byte {reason.start})") from reason
    except (OSError, EOFError, zlib.error) as reason:
        raise TaskFileError(
            f"{path}: cannot be read ({getattr(reason, 'strerror', None) or reason})"
        ) from reason


def read_hub_split(
    name: str, config: str | None, revision: str | None, split: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of a hub data set (or a local folder of data files), class numbers turned into their names.

    Raises:
        TaskFileError: If it cannot be loaded.
    """
    where = f"data set {name!r}, split {split!r}"
    try:
        with quiet():
            data = datasets.load_dataset(name, config, revision=revision, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as reason:
        raise TaskFileError(
            f"{where} cannot be loaded: {first_line(reason)} Check name, split and network, or give files instead."
        ) from reason
    names = {
        column: feature
        for column, feature in data.features.items()
        if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(data):
        at = f"{where}, row {number}"
        yield at, {key: _named(at, key, value, names.get(key)) for key, value in row.items()}


def _named(where: str, field: str, value: Any, classes: datasets.ClassLabel | None) -> Any:
    """The name of a class number; any other value as it is."""
    if classes is None or value is None:
        return value
    if not 0 <= value < classes.num_classes:  # -1 is how the hub's unlabelled test splits say so
        raise TaskFileError(
            f"{where}: {field!r} is {value}, which is no class of 0 to {classes.num_classes - 1}; such rows have no "
            "label, so choose another split"
        )
    return classes.int2str(value)


def check_rows(
    found: Iterable[tuple[str, Mapping[str, Any]]],
    kind: Kind,
    fields: tuple[str, str],
    labels: Sequence[str],
) -> list[Row]:
    """Rows in canonical form.

    Args:
        found: Raw rows, each with a description of where it stands.
        kind: What the rows must hold.
        fields: The names of the text (or input) and of the label (or target) in the raw rows.
        labels: The labels allowed, for classification.

    Raises:
        TaskFileError: For the first row with a missing, empty, overlong or wrong value; or if there are no
            rows, or too many.
    """
    known = frozenset(labels)
    rows: list[Row] = []
    for where, raw in found:
        if len(rows) == MAX_ROWS:
            raise TaskFileError(f"{where}: more than {MAX_ROWS:,} rows; keep a sample of them")
        text = _text(where, raw, fields[0])
        if kind == "classification":
            rows.append({"text": text, "label": _label(where, raw, fields[1], known)})
        else:
            rows.append({"input": text, **_targets(where, raw, fields[1])})
    return rows


def references(row: Row) -> tuple[str, ...]:
    """The right answers of a generation row, one or more."""
    return tuple(row["targets"]) if "targets" in row else (row["target"],)


def rows_to_bytes(rows: Iterable[Row]) -> bytes:
    """Canonical JSON lines: one row a line, sorted keys, no spaces, UTF-8. Equal rows give equal bytes."""
    lines = (json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()


def rows_digest(rows: Iterable[Row]) -> str:
    """SHA-256 (hex) of :func:`rows_to_bytes`."""
    return hashlib.sha256(rows_to_bytes(rows)).hexdigest()


def _text(where: str, raw: Mapping[str, Any], field: str) -> str:
    if field not in raw:
        raise TaskFileError(
            f"{where}: field {field!r} is missing (found {sorted(map(str, raw))}). Name the fields in the "
            "task file under `data`, as `text`, `label`, `input` or `target`."
        )
    return _checked(where, field, raw[field])


def _checked(where: str, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise TaskFileError(f"{where}: {field!r} is {_short(value)}; expected text")
    if not value.strip():
        raise TaskFileError(f"{where}: {field!r} is empty")
    if len(value) > MAX_CHARACTERS:
        raise TaskFileError(
            f"{where}: {field!r} has {len(value):,} characters; at most {MAX_CHARACTERS:,} are allowed"
        )
    return value


def _label(where: str, raw: Mapping[str, Any], field: str, known: frozenset[str]) -> str:
    label = _text(where, raw, field)
    if label not in known:
        raise TaskFileError(
            f"{where}: label {label!r} is not among the task's labels: {_short(sorted(known), 200)}"
        )
    return label


def _targets(where: str, raw: Mapping[str, Any], field: str) -> Row:
    """``target``, and ``targets`` if there are several: from ``targets`` or a list in the target field."""
    main, more = raw.get(field), raw.get("targets")
    found = (
        main if isinstance(main, list) else [_text(where, raw, field)] if more is None or field in raw else []
    )
    if more is not None and not isinstance(more, list):
        raise TaskFileError(f"{where}: 'targets' is {_short(more)}; expected a list of texts")
    several = list(dict.fromkeys(_checked(where, "targets", value) for value in [*found, *(more or [])]))
    if not 1 <= len(several) <= MAX_REFERENCES:
        raise TaskFileError(f"{where}: {len(several)} references; expected 1 to {MAX_REFERENCES}")
    return {"target": several[0]} if len(several) == 1 else {"target": several[0], "targets": several}


def _short(value: object, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
