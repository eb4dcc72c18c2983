"""One start of the services: in parallel, each watched until it works."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from hydraopt.errors import ServiceError
from hydraopt.progress import Progress
from infra.local_services import health, ports, processes
from infra.local_services.definition import Definition
from infra.local_services.definitions import define
from infra.local_services.profiles import EXECUTORS, PREFERRED_PORTS, SERVICES, may_start
from infra.local_services.state import Record, Records

START_TIMEOUT_S = 180.0
STOP_GRACE_S = 15.0

_ATTEMPTS = 3  # another program may take a port between our look and the service's
_POLL_S = 0.1
_LARGEST_LOG = 10 * 1024 * 1024
_LAST_LINES = 4096


class Startup:
    """One call of ``up``, holding the lock."""

    def __init__(self, home: Path, wanted: list[str], progress: Progress, timeout_s: float) -> None:
        self.home = home
        self.waiting = wanted
        self.total = len(wanted)
        self.progress = progress
        self.timeout_s = timeout_s
        self.records = Records.read(home)
        self.running: dict[str, Definition] = {}
        self.deadlines: dict[str, float] = {}
        self.attempts: dict[str, int] = {}
        self.provisioned: set[str] = set()

    def run(self) -> None:
        """Start what can be started, then look at each until all are healthy."""
        self._tell(f"start {', '.join(self.waiting)}")
        while self.waiting:
            for name in list(self.waiting):
                if name not in self.running and self._may_start(name):
                    self._ensure(name)
                if name in self.running and self._is_ready(name):
                    self._note_ready(name)
            if self.waiting:
                time.sleep(_POLL_S)

    def _note_ready(self, name: str) -> None:
        self.waiting.remove(name)
        self._tell(f"{name} is ready")
        if name not in EXECUTORS and self._only_executors_wait():
            # Their time begins now; and a server that lost its port meanwhile has another address.
            for executor in self.waiting:
                self._ensure(executor)

    def _only_executors_wait(self) -> bool:
        return EXECUTORS.issuperset(self.waiting)

    def _may_start(self, name: str) -> bool:
        """Whether what it needs is there. An executor loads its libraries and then waits for the servers itself."""
        profile = self.records.profile
        ready = set(SERVICES[profile]) - set(self.waiting)
        return may_start(profile, name, running=set(self.running), ready=ready)

    def _ensure(self, name: str) -> None:
        """Leave a living process that runs with what we want alone; replace anything else."""
        record = self.records.get(name)
        if processes.find(record.pid, record.started) is not None:
            definition = define(self.home, self.records, name, record.ports)
            if definition.digest == record.definition:
                self._watch(definition)
                return
        self.records = stop_service(self.home, self.records, name, STOP_GRACE_S)
        self._start(name)

    def _start(self, name: str) -> None:
        chosen = self._ports(name)
        definition = define(self.home, self.records, name, chosen)
        definition.prepare()
        self.attempts[name] = self.attempts.get(name, 0) + 1
        pid, started = processes.start(
            definition.command,
            environment=definition.environment,
            folder=definition.folder or self.home,
            log=_fresh_log(self.home, name),
            user=definition.user,
        )
        record = Record(
            address=definition.address, ports=chosen, pid=pid, started=started, definition=definition.digest
        )
        self.records = self.records.put(self.home, name, record)
        self._watch(definition)

    def _watch(self, definition: Definition) -> None:
        self.running[definition.name] = definition
        self.deadlines[definition.name] = time.monotonic() + self.timeout_s

    def _ports(self, name: str) -> dict[str, int]:
        """The recorded ports if they are all free, else the next free ones."""
        taken = {
            port
            for other, record in self.records.services.items()
            if other != name
            for port in record.ports.values()
        }
        recorded = self.records.get(name).ports
        preferred = recorded if recorded.keys() == PREFERRED_PORTS[name].keys() else PREFERRED_PORTS[name]
        return ports.choose(preferred, taken, with_grpc=name == "store")

    def _is_ready(self, name: str) -> bool:
        """Whether the service is healthy.

        Raises:
            ServiceError: If it ended, or its time is over.
        """
        if name in EXECUTORS and not self._only_executors_wait():
            return False
        record = self.records.get(name)
        if processes.find(record.pid, record.started) is None:
            self._start_again(name)
            return False
        try:
            if name not in self.provisioned:
                self.running[name].provision()
                self.provisioned.add(name)
            self.running[name].check(record.started or 0.0)
        except health.UnhealthyError as error:
            if time.monotonic() > self.deadlines[name]:
                raise self._failed(name, f"is not healthy after {self.timeout_s:.0f} s ({error})") from None
            return False
        return True

    def _start_again(self, name: str) -> None:
        """After an early end: once more if it ran before this call, or somebody else took a port meanwhile.

        Raises:
            ServiceError: If neither was the reason.
        """
        self.records = stop_service(self.home, self.records, name, STOP_GRACE_S)
        stolen = not all(ports.is_free(port) for port in self.records.get(name).ports.values())
        attempts = self.attempts.get(name, 0)  # none: it was alive when we looked, and has died since
        if attempts and (not stolen or attempts >= _ATTEMPTS):
            raise self._failed(name, "ended while starting")
        self._start(name)

    def _failed(self, name: str, what: str) -> ServiceError:
        log = log_of(self.home, name)
        return ServiceError(f"{name} {what}; its log is {log}{_last_line(log)}")

    def _tell(self, what: str) -> None:
        self.progress(self.total - len(self.waiting), self.total, what)


def stop_service(home: Path, records: Records, name: str, grace_s: float) -> Records:
    """Stop one service with all it started; returns what is now recorded.

    Raises:
        ServiceError: If something of it does not end.
    """
    record = records.get(name)
    leader = processes.find(record.pid, record.started)
    # PostgreSQL takes SIGTERM as a wish to wait until every client has gone.
    ask = signal.SIGINT if name == "postgres" else signal.SIGTERM
    if not processes.stop(leader, processes.mark(home, name), grace_s=grace_s, ask=ask):
        raise ServiceError(f"{name} (process {record.pid}) does not end, not even by SIGKILL")
    return records if record == record.stopped() else records.put(home, name, record.stopped())


def log_of(home: Path, name: str) -> Path:
    """The log of one service."""
    return home / "logs" / f"{name}.log"


def _fresh_log(home: Path, name: str) -> Path:
    """The log to append to; a long one is put aside first, one generation is kept."""
    log = log_of(home, name)
    if log.exists() and log.stat().st_size > _LARGEST_LOG:
        log.replace(log.with_suffix(".log.1"))
    return log


def _last_line(log: Path) -> str:
    """The last line that says something, ready to append to a message."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LAST_LINES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f", which ends with: {''.join(c for c in last if c.isprintable())[:300]}" if last else ""
