"""The process in tests/support/publishing_child.py, which forks publishers that die when told to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from managers import Manager
from running_store import RunningStore

ROOT = Path(__file__).parents[2]
CHILD = ROOT / "tests" / "support" / "publishing_child.py"


class Publishers:
    """Publishers of some bundles under the manager's name; the child's docstring tells what may be said to it."""

    def __init__(self, manager: Manager, store: RunningStore, home: Path, folders: Iterable[Path]) -> None:
        environment = os.environ | store.variables(manager.store.bucket)
        environment |= {
            "HYDRAOPT_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            [sys.executable, str(CHILD), manager.name, str(home / "alice.pem"), *map(str, folders)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout.readline() == "ready\n"

    def ask(self, line: str) -> str:
        """What became of those that the line started."""
        print(line, file=self._child.stdin, flush=True)
        return self._child.stdout.readline().strip()

    def stop(self) -> None:
        self._child.stdin.close()
        self._child.wait(30)
        self._child.stdout.close()
