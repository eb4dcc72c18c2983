"""The servers of one machine: object store, MLflow, Prefect, and the runner that executes the flows.

All bound to 127.0.0.1, all state below the home folder, each in a process of its own that outlives the
command that started it.
"""

from infra.local_services.lifecycle import down, status, up
from infra.local_services.state import ServiceState, ServiceStatus

__all__ = ["ServiceState", "ServiceStatus", "down", "status", "up"]
