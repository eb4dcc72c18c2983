"""A home folder with a tiny base model, and a process that runs the command line in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_tasks

CHILD = Path(__file__).with_name("commands_child.py")


@dataclass(frozen=True)
class Result:
    """What one command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.stdout)


class Pipeline:
    """A home with running services, a base model with task files, and a process that runs commands."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.variables = variables
        self.home = folder / "home"
        self.encoder = tiny_tasks.make_encoder(folder / "encoder")
        self._child: subprocess.Popen[str] | None = None

    def run(self, *commands: list[object]) -> list[Result]:
        """Run commands one after another, in one process that stays."""
        if self._child is None:
            self._child = self.start()
        return [self._ask(self._child, command) for command in commands]

    def start(self, **variables: str) -> subprocess.Popen[str]:
        """A new process for commands."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HYDRAOPT_")}
        with (self.folder / "child.log").open("a") as log:
            return subprocess.Popen(
                [sys.executable, str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={
                    **clean,
                    "HYDRAOPT_HOME": str(self.home),
                    "OMP_NUM_THREADS": "1",
                    **self.variables,
                    **variables,
                },
            )

    def run_with(self, variables: dict[str, str], command: list[object]) -> Result:
        """Run one command in a process of its own, with other variables."""
        with self.start(**variables) as child:
            result = self._ask(child, command)
            child.stdin.close()
        return result

    def stop(self) -> None:
        if self._child is not None:
            self._child.stdin.close()
            self._child.wait(timeout=60)

    def _ask(self, child: subprocess.Popen[str], command: list[object]) -> Result:
        print(json.dumps([str(word) for word in command]), file=child.stdin, flush=True)
        answer = child.stdout.readline()
        assert answer, f"{command} killed the process: {(self.folder / 'child.log').read_text()[-4000:]}"
        return Result(**json.loads(answer))

    def good(self, *commands: list[object]) -> list[dict[str, Any]]:
        """Run commands with --json that must all succeed."""
        results = self.run(*([*command, "--json"] for command in commands))
        for command, result in zip(commands, results, strict=True):
            assert result.code == 0, f"{command}: {result.stderr[-4000:]}"
        return [result.json for result in results]

    def task(self, name: str, **changes: Any) -> Path:
        return tiny_tasks.write_task(self.folder / "tasks", name, self.encoder, **changes)
