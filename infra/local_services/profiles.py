"""Which services a profile has, in the order in which they depend on each other, and where they listen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from infra.local_services.pools import POOLS, service_of

Profile = Literal["local", "production"]

WORKERS = tuple(service_of(pool) for pool in POOLS)
SERVICES: Mapping[Profile, tuple[str, ...]] = {
    "local": ("store", "mlflow", "prefect", "runner"),
    "production": ("postgres", "store", "mlflow", "prefect", *WORKERS),
}
EXECUTORS = frozenset({"runner", *WORKERS})
"""They execute flows and need every server; they load their libraries first and then wait for the servers."""

DATABASE_USERS = frozenset({"mlflow", "prefect"})
"""In the production profile they must not start before PostgreSQL has their databases."""

PREFERRED_PORTS: Mapping[str, Mapping[str, int]] = {
    "postgres": {"sql": 5432},
    "store": {"s3": 8333, "master": 8334, "volume": 8335, "filer": 8336, "admin": 8337},
    "mlflow": {"http": 5000},
    "prefect": {"http": 4200},
    **{name: {} for name in EXECUTORS},
}


def may_start(profile: Profile, name: str, *, running: set[str], ready: set[str]) -> bool:
    """Whether what ``name`` needs is there, given which services run and which of them are ready."""
    if name in EXECUTORS:
        return set(SERVICES[profile]) - EXECUTORS <= running | ready
    return profile == "local" or name not in DATABASE_USERS or "postgres" in ready
