"""A home folder with a tiny base model, and a process that runs the command line in it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_tasks

from hydraopt.errors import ServiceError
from infra import local_services
from infra.local_services import database

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
        return [self.ask(self._child, command) for command in commands]

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
            result = self.ask(child, command)
            child.stdin.close()
        return result

    def stop(self) -> None:
        if self._child is not None:
            self._child.stdin.close()
            self._child.wait(timeout=60)
            self._child = None

    def ask(self, child: subprocess.Popen[str], command: list[object]) -> Result:
        """Run one command in a process that :meth:`start` started."""
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


@contextlib.contextmanager
def production_pipeline() -> Iterator[Pipeline]:
    """The whole production profile running, in a folder that PostgreSQL's user can enter when we are root."""
    pytest.importorskip("psycopg2", reason="needs the extra `production`")
    try:
        database.program("postgres")
    except ServiceError as error:
        pytest.skip(f"{error}; continuous integration does so by itself, see .ci/run")
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        for variable in [variable for variable in os.environ if variable.startswith("HYDRAOPT_")]:
            patch.delenv(variable)
        folder = Path(name)
        folder.chmod(0o711)
        made = Pipeline(folder)
        try:
            local_services.up(made.home, profile="production")
            yield made
        finally:
            made.stop()
            local_services.down(made.home)
