"""Start, stop and inspect the local services, as often as one likes and from several terminals at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hydraopt.errors import HydraoptError, ServiceError
from hydraopt.progress import Progress
from infra.local_services import health, processes
from infra.local_services.definition import TEMPORARY_FOLDER
from infra.local_services.definitions import define
from infra.local_services.profiles import EXECUTORS, SERVICES, Profile
from infra.local_services.role_files import write_role_files
from infra.local_services.startup import (
    START_TIMEOUT_S,
    STOP_GRACE_S,
    Startup,
    log_of,
    stop_service,
)
from infra.local_services.state import Records, ServiceState, ServiceStatus
from infra.settings import PREFIX, Settings

_LOCK_FILE = "services.lock"
_LOCK_WAIT_S = 600.0
_VARIABLE = {"store": "S3_ENDPOINT", "mlflow": "MLFLOW_URI", "prefect": "PREFECT_API_URL"}


def up(
    home: Path,
    *,
    profile: Profile | None = None,
    runner: bool = True,
    progress: Progress | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> ServiceStatus:
    """Have every service running and healthy; start only what is not.

    A server that a ``HYDRAOPT_*`` variable names is left alone. Safe to call twice at once: the second waits.

    Args:
        home: Folder of all state, made if missing.
        profile: Which servers; None: those the home has, at first "local".
        runner: Whether to start what executes flows, too.
        progress: Told whenever a service is ready.
        timeout_s: Seconds one service may take to become healthy.

    Raises:
        HydraoptError: If the home has the other profile.
        ServiceError: If a service does not become healthy; names its log. The others stay as they are.
    """
    home = _prepare(home)
    with _locked(home):
        chosen = Records.read(home).choose(home, profile).profile
        wanted = [
            name for name in SERVICES[chosen] if (runner or name not in EXECUTORS) and not _elsewhere(name)
        ]
        Startup(home, wanted, progress or _silent, timeout_s).run()
        if chosen == "production":
            write_role_files(Settings.load(home))
    return status(home)


def down(home: Path, *, progress: Progress | None = None, grace_s: float = STOP_GRACE_S) -> ServiceStatus:
    """Stop every service that ``up`` started below ``home``; data and ports stay.

    Each gets SIGTERM and, if it is not gone ``grace_s`` seconds later, SIGKILL, with everything it started. A
    process that is not ours is never touched, even if it has the process number of one that was.

    Raises:
        ServiceError: If a process cannot be stopped.
    """
    home = home.expanduser().absolute()
    if not home.is_dir():
        return status(home)
    tell = progress or _silent
    with _locked(home):
        records = Records.read(home)
        names = SERVICES[records.profile]
        for done, name in enumerate(reversed(names)):  # executors first: they use the others
            tell(done, len(names), f"stop {name}")
            records = stop_service(home, records, name, grace_s)
        tell(len(names), len(names), "all stopped")
    with suppress(HydraoptError):  # to stop takes no settings, which may be what is broken
        return status(home)
    return ServiceStatus(
        home=home, profile=records.profile, services=tuple(_stopped(home, records, name) for name in names)
    )


def _stopped(home: Path, records: Records, name: str) -> ServiceState:
    return ServiceState(
        name=name,
        address=records.get(name).address,
        running=False,
        healthy=False,
        pid=None,
        log=log_of(home, name),
        problem="not running",
    )


def status(home: Path) -> ServiceStatus:
    """What runs below ``home`` and whether it works; changes nothing."""
    home = home.expanduser().absolute()
    records = Records.read(home)
    settings = Settings.load(home)
    states = []
    for name in SERVICES[records.profile]:
        address = _address(settings, name)
        if _elsewhere(name) and address is not None:
            states.append(_state_elsewhere(name, address))
        else:
            states.append(_state(settings, records, name))
    return ServiceStatus(home=home, profile=records.profile, services=tuple(states))


def _state(settings: Settings, records: Records, name: str) -> ServiceState:
    record = records.get(name)
    process = processes.find(record.pid, record.started)
    problem: str | None = None
    if process is None:
        problem = (
            "not running" if record.pid is None else f"its process {record.pid} is gone: run `hydraopt up`"
        )
    else:
        try:
            define(settings.home, records, name, record.ports).check(record.started or 0.0)
        except (health.UnhealthyError, ServiceError) as error:
            problem = str(error)
    return ServiceState(
        name=name,
        address=record.address,
        running=process is not None,
        healthy=problem is None,
        pid=process.pid if process is not None else None,
        log=log_of(settings.home, name),
        problem=problem,
    )


def _state_elsewhere(name: str, address: str) -> ServiceState:
    problem: str | None = None
    try:
        if address.startswith("http"):  # MLflow may also be a database address, which does not answer
            health.check_elsewhere(address)
    except health.UnhealthyError as error:
        problem = str(error)
    answers = problem is None
    return ServiceState(
        name=name, address=address, running=answers, healthy=answers, problem=problem, elsewhere=True
    )


def _elsewhere(name: str) -> bool:
    """Whether a variable says that this server runs somewhere else."""
    return name in _VARIABLE and bool(os.environ.get(PREFIX + _VARIABLE[name]))


def _address(settings: Settings, name: str) -> str | None:
    return {
        "store": settings.s3_endpoint,
        "mlflow": settings.mlflow_uri,
        "prefect": settings.prefect_api_url,
    }.get(name)


def _prepare(home: Path) -> Path:
    """Make the home folder, for its owner only, and keep it out of version control: it holds keys."""
    home = home.expanduser().absolute()
    try:
        if not home.is_dir():
            home.mkdir(parents=True, mode=0o700)
        for folder in ("logs", "store", "prefect", "mlflow-artifacts", TEMPORARY_FOLDER):
            (home / folder).mkdir(exist_ok=True, mode=0o700)
        ignore = home / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n", encoding="utf-8")
    except OSError as error:
        raise ServiceError(f"home folder {home} cannot be made: {error.strerror}") from None
    return home


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One `up` or `down` at a time; the lock dies with its holder, the file left behind means nothing."""
    try:
        with FileLock(home / _LOCK_FILE, timeout=_LOCK_WAIT_S):
            yield
    except Timeout:
        raise ServiceError(
            f"another `hydraopt up` or `down` has been busy with {home} for ten minutes"
        ) from None


def _silent(done: int, total: int, what: str) -> None:
    """Tell nobody."""
