"""What ``services.json`` remembers about the processes, and what ``status`` tells about them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.atomic_files import write_atomically
from hydraopt.errors import HydraoptError
from infra.local_services.profiles import Profile
from infra.settings import SERVICES_FILE


class Record(BaseModel):
    """One service as last started. Ports stay after it stopped, so that it comes back at the same address."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str | None = None
    ports: dict[str, int] = Field(default_factory=dict, description="Port of 127.0.0.1 by role.")
    pid: int | None = Field(None, description="Process number; None: stopped on purpose or never started.")
    started: float | None = Field(None, description="When that process began, seconds since 1970.")
    definition: str | None = Field(None, description="SHA-256 of the command and variables it runs with.")

    def stopped(self) -> Record:
        """The same service without a process."""
        return self.model_copy(update={"pid": None, "started": None, "definition": None})


class Records(BaseModel):
    """The content of ``services.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(1, ge=1, le=1)
    profile: Profile = Field("local", description="Chosen by the first `up`; a home keeps it.")
    services: dict[str, Record] = Field(default_factory=dict)

    @classmethod
    def read(cls, home: Path) -> Records:
        """What is recorded below ``home``; empty if nothing is.

        Raises:
            HydraoptError: If the file is damaged.
        """
        path = home / SERVICES_FILE
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except (OSError, ValidationError):
            raise HydraoptError(
                f"{path} is damaged: stop what still runs for {home}, move the file away, run `hydraopt up`"
            ) from None

    def get(self, name: str) -> Record:
        """The record of one service; an empty one if it never ran."""
        return self.services.get(name, Record())

    def put(self, home: Path, name: str, record: Record) -> Records:
        """Write ``record`` atomically; returns what is now recorded."""
        return _kept(home, self.model_copy(update={"services": {**self.services, name: record}}))

    def choose(self, home: Path, profile: Profile | None) -> Records:
        """These records with ``profile``, or with what the home has if that is None; written down.

        Raises:
            HydraoptError: If services of the other profile were started here: their data is elsewhere.
        """
        if profile is None or profile == self.profile:
            return self
        if self.services:
            raise HydraoptError(
                f"home {home} has the profile {self.profile!r}: its data is not found by {profile!r}; "
                "set HYDRAOPT_HOME to another folder"
            )
        return _kept(home, self.model_copy(update={"profile": profile}))


def _kept(home: Path, records: Records) -> Records:
    """Write atomically; returns what was written."""
    write_atomically(home / SERVICES_FILE, records.model_dump_json(indent=2).encode())
    return records


class ServiceState(BaseModel):
    """One service now."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    address: str | None = Field(None, description="Where it listens; an executor listens nowhere.")
    running: bool = Field(
        description="Whether its process lives; for a server elsewhere: whether it answers."
    )
    healthy: bool = Field(description="Whether it did a small piece of real work when asked just now.")
    pid: int | None = None
    log: Path | None = Field(None, description="Its log; None for a server elsewhere.")
    problem: str | None = Field(None, description="Why it is not healthy.")
    elsewhere: bool = Field(
        False, description="Whether a HYDRAOPT_* variable names it: not ours to start or stop."
    )


class ServiceStatus(BaseModel):
    """All services now, in the order in which they depend on each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Path
    profile: Profile = "local"
    services: tuple[ServiceState, ...]

    @property
    def healthy(self) -> bool:
        """Whether every service is."""
        return all(service.healthy for service in self.services)

    def __getitem__(self, name: str) -> ServiceState:
        """The state of the service called ``name``; KeyError if there is none."""
        for service in self.services:
            if service.name == name:
                return service
        raise KeyError(name)
