"""PostgreSQL on this machine: find it, make its cluster, give Prefect and MLflow their databases."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import psutil

from hydraopt.errors import ServiceError
from infra.local_services import processes
from infra.local_services.health import UnhealthyError

_PLACES = ("/usr/lib/postgresql", "/usr/pgsql", "/opt/homebrew/opt", "/usr/local/opt")
"""Where distributions keep the server's programs, below a folder per version."""
_OLDEST = 14  # databases.sql reads passwords with psql's \getenv
_UNPRIVILEGED = ("postgres", "nobody")
INITDB_OPTIONS = ("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums")
"""How a cluster is made, here and in a container."""

_INIT_TIMEOUT_S = 120.0
_SQL_TIMEOUT_S = 20.0
_ORPHANS_NOTICE_S = 3.0


class User(NamedTuple):
    """Whom PostgreSQL runs as."""

    name: str
    uid: int
    gid: int


def program(name: str) -> str:
    """Path of one of PostgreSQL's programs: the newest in a distribution's place, else the one on PATH.

    Raises:
        ServiceError: If there is none that is new enough.
    """
    found = [
        (_major(folder.parent.name), folder / name)
        for place in _PLACES
        for folder in Path(place).glob("*/bin")
        if (folder / name).exists() and (folder / "initdb").exists()
    ]
    if found:
        version, path = max(found)
        if version >= _OLDEST:
            return str(path)
    on_path = shutil.which(name) if shutil.which("initdb") else None
    if on_path is None:
        raise ServiceError(
            f"PostgreSQL {_OLDEST} or newer ({name!r}) is not installed: `apt-get install postgresql`, or the "
            "same from your distribution"
        )
    return on_path


def _major(folder: str) -> int:
    """The major version in a folder's name, such as ``15``, ``9.6`` or ``postgresql@16``; 0 if there is none."""
    number = re.search(r"\d+", folder)
    return int(number[0]) if number else 0


def run_as() -> User | None:
    """The account PostgreSQL gets if we are root, which it refuses to run as; None: our own.

    Raises:
        ServiceError: If there is no such account.
    """
    if os.geteuid() != 0:
        return None
    for name in _UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return User(name, entry.pw_uid, entry.pw_gid)
    raise ServiceError(
        f"PostgreSQL refuses to run as root, and none of the users {', '.join(_UNPRIVILEGED)} exists: "
        "run `hydraopt up` as an ordinary user"
    )


def make_cluster(folder: Path, password: str, user: User | None) -> None:
    """Have an initialised data folder at ``folder / "data"``. A half-made one of a killed call is made again.

    Args:
        folder: In the home folder.
        password: Of the database's administrator.
        user: Whose the folder becomes; None: ours.

    Raises:
        ServiceError: If that user cannot enter the folder, or PostgreSQL fails; says what it printed.
    """
    folder.mkdir(exist_ok=True, mode=0o700)
    if user is not None:
        os.chown(folder, user.uid, user.gid)
        _let_in(folder, user)
    data, half = folder / "data", folder / "data.new"
    if data.exists():
        return
    shutil.rmtree(half, ignore_errors=True)
    secret = folder / "password"
    secret.unlink(missing_ok=True)
    try:
        descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(password + "\n")
        if user is not None:
            os.chown(secret, user.uid, user.gid)
        _run(
            [
                program("initdb"),
                f"--pgdata={half}",
                "--username=postgres",
                f"--pwfile={secret}",
                *INITDB_OPTIONS,
            ],
            folder,
            {},
            user,
            _INIT_TIMEOUT_S,
        )
    finally:
        secret.unlink(missing_ok=True)
    half.rename(data)


def end_orphans(folder: Path) -> None:
    """Have nothing left of a server that was killed: its children hold the memory that the next one asks for.

    They end by themselves, but not at once. They hide the variables by which others are found; all of them work in
    the data folder, and nobody else does.
    """
    data = folder / "data"
    left = [process for process in psutil.process_iter() if _works_in(process, data)]
    if processes.gone(left, _ORPHANS_NOTICE_S):
        return
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    processes.gone(left, _ORPHANS_NOTICE_S)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()) == folder
    except (psutil.Error, OSError):
        return False


def provision(port: int, password: str, variables: Mapping[str, str]) -> None:
    """Have the roles and databases of ``databases.sql``.

    Args:
        port: Where the server listens on 127.0.0.1.
        password: Of its administrator.
        variables: The passwords that the file reads.

    Raises:
        UnhealthyError: If the server does not take it yet.
    """
    login = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "postgres", "PGPASSWORD": password}
    script = resources.files("infra.local_services").joinpath("databases.sql")
    with resources.as_file(script) as path:
        command = [program("psql"), "--quiet", "--no-psqlrc", "--dbname=postgres", f"--file={path}"]
        try:
            _run(command, Path("/"), {**login, **variables}, None, _SQL_TIMEOUT_S)
        except ServiceError as error:
            raise UnhealthyError(str(error)) from None


def _run(
    command: list[str], folder: Path, variables: Mapping[str, str], user: User | None, timeout_s: float
) -> None:
    """Run one of PostgreSQL's programs to its end; its words go into the error."""
    plain = {name: os.environ[name] for name in ("PATH", "LANG", "TZ") if name in os.environ}
    account = {} if user is None else {"user": user.uid, "group": user.gid, "extra_groups": []}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**plain, **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
            **account,  # type: ignore[call-overload]
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServiceError(f"postgres: {Path(command[0]).name} failed ({type(error).__name__})") from None
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-400:]
        raise ServiceError(f"postgres: {Path(command[0]).name} failed: {words}")


def _let_in(folder: Path, user: User) -> None:
    """Let the user through the home folder, and nobody else: by its group, to pass and not to list.

    Raises:
        ServiceError: If a folder above the home is closed to the user.
    """
    home = folder.parent
    os.chown(home, -1, user.gid)
    home.chmod((home.stat().st_mode & 0o707) | 0o010)
    for above in home.parents:
        facts = above.stat()
        groups = {user.gid, *(group.gr_gid for group in grp.getgrall() if user.name in group.gr_mem)}
        bit = 0o100 if facts.st_uid == user.uid else 0o010 if facts.st_gid in groups else 0o001
        if not facts.st_mode & bit:
            raise ServiceError(
                f"PostgreSQL refuses to run as root and its user {user.name!r} cannot enter {above}: set "
                "HYDRAOPT_HOME to a folder below open ones, such as /var/lib/hydraopt, or run as an ordinary user"
            )
