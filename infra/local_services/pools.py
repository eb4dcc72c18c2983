"""The work pools of the production profile, who serves them on this machine, and what that is started with."""

from __future__ import annotations

POOLS = ("cpu", "gpu")
EXECUTOR_MODULE = "infra.local_services.warm_start"
"""Started with the module of the runner or of a worker, which it becomes."""


def service_of(pool: str) -> str:
    """The service that executes the pool's flows; its worker has the same name on Prefect's server."""
    return f"worker-{pool}"
