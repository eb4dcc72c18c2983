"""Who is killed in the production profile, and when."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from infra import local_services
from infra.local_services import processes

VICTIMS = ("worker", "merge", "prefect", "mlflow", "postgres", "store")
STEPS = ("ingest", "reconcile", "approve")
_MERGE_STARTS_S = 60.0


class Strike(NamedTuple):
    """SIGKILL for some, so many seconds into a step of a change."""

    victims: tuple[str, ...]
    step: str
    delay_s: float
    gap_s: float
    """Between one victim and the next."""

    def __str__(self) -> str:
        return f"{' + '.join(self.victims)}, {self.delay_s:.1f} s into {self.step}"


def draw(victims: tuple[str, ...], lasts: dict[str, float], chance: random.Random) -> Strike:
    """A moment for these victims, given how long each step lasts undisturbed."""
    # A merge can be killed only while one goes on.
    step = "reconcile" if "merge" in victims else chance.choice(STEPS)
    delay_s = chance.uniform(0, lasts[step] * (0.5 if "merge" in victims else 1))
    return Strike(victims, step, delay_s, gap_s=chance.uniform(0, 1))


class Striker:
    """Carries a strike out once its step begins, or when the change is over, whichever is first."""

    def __init__(self, home: Path, strike: Strike) -> None:
        self.home, self.strike = home, strike
        self.struck_at: float | None = None
        self._due, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._wait_and_strike)
        self._thread.start()

    def enters(self, step: str) -> None:
        if step == self.strike.step:
            self._due.set()

    def change_is_over(self) -> None:
        self._over.set()
        self._due.set()

    def wait(self) -> None:
        self._thread.join()

    def _wait_and_strike(self) -> None:
        self._due.wait()
        self._over.wait(self.strike.delay_s)
        for number, victim in enumerate(self.strike.victims):
            if number:
                time.sleep(self.strike.gap_s)
            self._kill(victim)
        self.struck_at = time.monotonic()

    def _kill(self, victim: str) -> None:
        for process in self._targets(victim):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _targets(self, victim: str) -> list[psutil.Process]:
        if victim == "merge":
            end = time.monotonic() + _MERGE_STARTS_S
            while not (found := self._flows("worker-gpu")) and time.monotonic() < end:
                if self._over.wait(0.1):
                    break
            return found
        name = "worker-gpu" if victim == "worker" else victim
        leader = local_services.status(self.home)[name].pid
        return [] if leader is None else [psutil.Process(leader)]

    def _flows(self, worker: str) -> list[psutil.Process]:
        """The processes that a worker started."""
        leader = local_services.status(self.home)[worker].pid
        return [one for one in processes.family(processes.mark(self.home, worker)) if one.pid != leader]
