"""Files of a folder that somebody else made: none of them may be a link to something outside it."""

from __future__ import annotations

from pathlib import Path

from hydraopt.errors import HydraoptError


def own_file(folder: Path, name: str, error: type[HydraoptError]) -> Path:
    """The path of a file in ``folder``, which need not exist.

    A stranger's link would have us read, and store for all to see, whatever this process may read. The hub's cache
    alone keeps its files beside its folders: ``snapshots/REVISION/NAME`` leads to ``blobs/DIGEST``.

    Raises:
        HydraoptError: Of the given class, if it, or a folder on the way to it, is a link that leads elsewhere or in a
            circle.
    """
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as reason:  # what Python 3.11 raises for links in a circle
        raise error(f"{path}: cannot be found: {reason}") from reason
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not in_cache:
        raise error(f"{path} is a link that leads out of its folder, to {real}: put the file itself there")
    return path
