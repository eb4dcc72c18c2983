"""Half of the demo's trainings in a process of their own: small models keep one core busy, not two.

The child first does what another team would do elsewhere: it trains adapters with the library alone, while
the servers still start. Then it waits for a line on stdin and runs ``finetune-task`` for its share of the
pipeline's tasks. It tells of its work in JSON lines on stdout, and ends when its parent does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

import hydraopt.errors
from hydraopt.errors import HydraoptError
from infra.settings import Settings


class SecondProcess:
    """The parent's side."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._results: list[dict[str, Any]] = []
        self._failure: dict[str, str] | None = None
        self._progress: Callable[[int, int, str], None] | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    @contextlib.contextmanager
    def started(
        cls, settings: Settings, elsewhere: Sequence[Path], pipeline: Sequence[Path]
    ) -> Iterator[SecondProcess]:
        """Start it; it is gone when the block is left.

        Args:
            settings: Of this deployment; its servers may still be starting.
            elsewhere: Task files to train an adapter for with the library alone.
            pipeline: Task files to run ``finetune-task`` for, once :meth:`servers_are_up` was called.
        """
        log = settings.home / "logs" / "demo-second-process.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "flows.demo.second_process"]
        command.append(json.dumps([[str(path) for path in paths] for paths in (elsewhere, pipeline)]))
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads()), "HYDRAOPT_HOME": str(settings.home)}
        with log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=variables,
            )
        try:
            yield cls(process, log)
        finally:
            process.kill()
            process.wait()

    def servers_are_up(self) -> None:
        """Let it run flows."""
        with contextlib.suppress(BrokenPipeError):  # it failed already; `results` tells how
            print("up", file=self._process.stdin, flush=True)

    @contextlib.contextmanager
    def reporting(self, progress: Callable[[int, int, str], None]) -> Iterator[None]:
        """Pass its progress on while the block runs."""
        self._progress = progress
        try:
            yield
        finally:
            self._progress = None

    def results(self) -> list[dict[str, Any]]:
        """Wait for its end; what its flows returned, in order.

        Raises:
            HydraoptError: What it raised.
            RuntimeError: If it failed in a way hydraopt does not expect.
        """
        self._reader.join()
        code = self._process.wait()
        if self._failure is not None:
            known = getattr(hydraopt.errors, self._failure["kind"], HydraoptError)
            raise known(self._failure["message"])
        if code != 0:
            raise RuntimeError(f"the demo's second process ended with code {code}: see {self._log}")
        return self._results

    def _read(self) -> None:
        """Take in what it tells, in a thread."""
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            told = json.loads(line)
            if "progress" in told and self._progress is not None:
                self._progress(*told["progress"])
            if "result" in told:
                self._results.append(told["result"])
            if "failure" in told:
                self._failure = told["failure"]


def threads() -> int:
    """Threads of each of two processes that train at the same time."""
    return max(1, (os.cpu_count() or 2) // 2)


def _child(elsewhere: list[Path], pipeline: list[Path]) -> None:
    """The child's side."""
    up = threading.Event()
    threading.Thread(target=_listen, args=[up], daemon=True).start()
    tell = _Teller()
    settings = Settings.load()
    # One killed just now may not have noticed yet that its parent is gone.
    with FileLock(settings.home / "demo" / "second-process.lock"):
        try:
            _work(settings, elsewhere, pipeline, up, tell)
        except HydraoptError as error:
            tell(failure={"kind": type(error).__name__, "message": str(error)})
            raise SystemExit(1) from error


def _work(
    settings: Settings, elsewhere: list[Path], pipeline: list[Path], up: threading.Event, tell: _Teller
) -> None:
    from flows.demo.material import train_elsewhere

    for task_file in elsewhere:
        train_elsewhere(settings, task_file, tell.progress)
    up.wait()

    from flows.connection import connect, running_flows

    connected = connect()
    from flows.finetune_task import finetune_task
    from tasks.verb import reporting

    with running_flows(connected), reporting(tell.progress):
        for task_file in pipeline:
            tell(result=finetune_task(task_file))


def _listen(up: threading.Event) -> None:
    """Note that the servers are up; go when the parent is gone, whatever killed it."""
    for _ in sys.stdin:
        up.set()
    os._exit(1)


class _Teller:
    """Writes JSON lines to what was stdout; what a library prints goes to the log."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def __call__(self, **told: Any) -> None:
        json.dump(told, self._out)
        print(file=self._out, flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        """Tell of progress."""
        self(progress=[done, total, what])


if __name__ == "__main__":
    _child(*([Path(path) for path in paths] for paths in json.loads(sys.argv[1])))
