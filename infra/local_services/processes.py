"""Processes that outlive us: started detached, recognised for certain, stopped with everything they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.local_services.database import User

MARK = "SERVICE_OF_HYDRAOPT"
"""Variable that a service and all its descendants carry: how leftovers of a killed one are recognised."""

_SAME_START_S = 2.0  # psutil derives the start from the wall clock, which may be adjusted a little
_POLL_S = 0.05


def mark(home: Path, name: str) -> str:
    """The value of :data:`MARK` for the service ``name`` below ``home``."""
    return f"{name}@{home}"


def start(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: Path,
    log: Path,
    user: User | None = None,
) -> tuple[int, float]:
    """Start ``command`` in a session of its own, so that closing the terminal does not reach it.

    Args:
        command: Program and arguments.
        environment: All its variables.
        folder: Its working directory.
        log: File to append its output to.
        user: Account to run as; None: ours.

    Returns:
        Its process number, and when it began in seconds since 1970.
    """
    account: dict[str, Any] = (
        {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}
    )
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **account,
        )
    # Somebody has to collect the exit status while we live, or a dead service would look like a live one.
    threading.Thread(target=process.wait, name=f"reap {process.pid}", daemon=True).start()
    try:
        return process.pid, psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        return process.pid, time.time()


def find(pid: int | None, started: float | None) -> psutil.Process | None:
    """The living process with this number that began at this time; a later one with the same number is not it."""
    if pid is None or started is None:
        return None
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if abs(process.create_time() - started) <= _SAME_START_S and _lives(process):
            return process
    return None


def family(value: str) -> set[psutil.Process]:
    """Every living process whose :data:`MARK` is ``value``, except this one and those it runs in."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in own and process.environ().get(MARK) == value and _lives(process):
                found.add(process)
    return found


def stop(
    leader: psutil.Process | None, value: str, *, grace_s: float, ask: signal.Signals = signal.SIGTERM
) -> bool:
    """Stop a service and all it started: the signal ``ask``, and SIGKILL for what is left after ``grace_s`` seconds.

    psutil compares start times before each signal, so a process that took over a number is never hit.

    Args:
        leader: Its first process if that lives; it alone is asked, so that it can stop its own children in order.
        value: The mark its processes carry.
        grace_s: Seconds it may take to stop by itself.
        ask: What asks it to stop.

    Returns:
        Whether nothing of it is left.
    """
    everyone = family(value)
    if leader is not None:
        with contextlib.suppress(psutil.Error):
            everyone |= {leader, *leader.children(recursive=True)}
    _signal([leader] if leader is not None else everyone, ask)
    if gone(everyone, grace_s):
        everyone = family(value)  # what it started while stopping
    else:
        everyone |= family(value)
    _signal(everyone, signal.SIGKILL)
    return gone(everyone, 5.0)


def gone(processes: Iterable[psutil.Process], timeout_s: float) -> bool:
    """Whether all of ``processes`` end within ``timeout_s`` seconds.

    One that ended counts, whether or not its parent has asked for its status yet: where nobody adopts orphans, as in
    many containers, nobody ever will.
    """
    left = list(processes)
    end = time.monotonic() + timeout_s
    while True:
        left = [process for process in left if _lives(process)]
        if not left:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)


def _signal(processes: Iterable[psutil.Process], which: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(which)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
