"""What flows log: every line says which bundle and which adapter set it is about.

Prefect keeps the lines of a run with the run; ``<home>/logs/flows.jsonl`` keeps those of all runs, a JSON object
a line, for whatever collects logs.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from prefect import get_run_logger, runtime
from prefect.exceptions import MissingContextError

from infra.settings import Settings

_LOGGERS = ("prefect.flow_runs", "prefect.task_runs")
_LARGEST_LOG = 10 * 1024 * 1024
_MOST_RUNS = 64  # of one process whose names are remembered
_about: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar("hydraopt_about", default=None)
_whole_runs: dict[str, dict[str, str]] = {}
"""By flow run, what all of it is about: Prefect logs how a run ended when our code has been left."""


@contextlib.contextmanager
def on_every_line(settings: Settings, *, whole_run: bool = False, **about: str | None) -> Iterator[None]:
    """Name what is worked on in every line logged inside, Prefect's own included.

    Args:
        settings: Name the home folder whose log the lines go to.
        whole_run: Whether all of this flow run is about it: then the line on how it ended says so, too.
        about: Such as ``bundle``, ``fingerprint`` and ``bundle_id``; None leaves a word out. Blocks may be
            nested: the inner one adds to the outer one.
    """
    _attach(settings.home / "logs" / "flows.jsonl")
    names = {**(_about.get() or {}), **{key: value for key, value in about.items() if value}}
    token = _about.set(names)
    run_id = runtime.flow_run.id if whole_run else None
    if run_id is not None:
        _whole_runs[str(run_id)] = names
        for run in list(_whole_runs)[:-_MOST_RUNS]:
            _whole_runs.pop(run, None)
    try:
        yield
    finally:
        _about.reset(token)


def say(message: str, *values: object) -> None:
    """Log a line for people, where a run keeps its lines; without a run it goes nowhere."""
    with contextlib.suppress(MissingContextError):
        get_run_logger().info(message, *values)


class _Names(logging.Filter):
    """Puts the names into the record, and before its message: Prefect's server keeps nothing but the message."""

    def filter(self, record: logging.LogRecord) -> bool:
        about = _about.get() or _whole_runs.get(str(getattr(record, "flow_run_id", None)))
        if about and not hasattr(record, "about"):
            record.about = about
            names = " ".join(f"{key}={value[:12]}" for key, value in about.items())
            record.msg, record.args = f"[{names}] {record.getMessage()}", ()
        return True


class _JsonLines(logging.Handler):
    """Appends a JSON object per record, each in one write, so that the lines of several processes stay whole."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "flow": getattr(record, "flow_name", None),
            "run": getattr(record, "flow_run_name", None),
            "run_id": getattr(record, "flow_run_id", None),
            "task_run": getattr(record, "task_run_name", None),
            **getattr(record, "about", {}),
            "message": record.getMessage(),
        }
        text = json.dumps({key: value for key, value in line.items() if value is not None}, default=str)
        try:
            with self.path.open("ab", buffering=0) as file:
                file.write(text.encode() + b"\n")
        except OSError:  # a full disk must not end a merge; Prefect has the line, too
            self.handleError(record)


def _attach(path: Path) -> None:
    """Have the loggers of runs name what is worked on, and write to ``path``; once per process and path."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if any(isinstance(one, _JsonLines) and one.path == path for one in logger.handlers):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > _LARGEST_LOG:
            path.replace(path.with_suffix(".jsonl.1"))
        if not any(isinstance(one, _Names) for one in logger.filters):
            logger.addFilter(_Names())
        logger.addHandler(_JsonLines(path))
