"""The task files a deployment keeps trained: YAML files in ``<home>/tasks``."""

from __future__ import annotations

from pathlib import Path

from hydraopt.errors import TaskFileError

FOLDER = "tasks"
"""Where they lie, or links to them, below the home folder."""

_SUFFIXES = {".yaml", ".yml"}


def kept_task_files(home: Path) -> list[Path]:
    """Their absolute paths, links followed, by name; none if there is no such folder.

    Raises:
        TaskFileError: If the folder cannot be read.
    """
    folder = home / FOLDER
    try:
        # A task's data lies beside its file, not beside a link to it.
        found = [path.resolve() for path in folder.iterdir() if path.suffix in _SUFFIXES]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TaskFileError(f"{folder}: cannot be read ({error.strerror})") from None
    return sorted(found)
