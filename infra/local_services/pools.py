"""The work pools of the production profile, and the name under which this machine's worker serves one."""

from __future__ import annotations

POOLS = ("cpu", "gpu")


def service_of(pool: str) -> str:
    """The service that executes the pool's flows; its worker has the same name on Prefect's server."""
    return f"worker-{pool}"
