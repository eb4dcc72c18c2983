"""Become the runner or a worker, with what takes long to load loaded while the servers still start.

``up`` starts this together with the servers: on two cores that saves a third of the whole time.
``python -m infra.local_services.warm_start MODULE ARGUMENTS...`` is ``python -m MODULE ARGUMENTS...``, later.
"""

from __future__ import annotations

import importlib
import runpy
import sys
import time

from infra.local_services import health
from infra.settings import Settings

# By name: nothing here uses them, and this package knows no orchestrator.
_SLOW_TO_LOAD = (
    "hydraopt.training.finetune",
    "infra.bundle_registry",
    "infra.object_store",
    "prefect.runner",
)
_PATIENCE_S = 300.0
_POLL_S = 0.1


def main() -> None:
    """Load, wait for the servers, run the module in this process."""
    for module in _SLOW_TO_LOAD:
        importlib.import_module(module)
    if not _servers_answer(Settings.load()):
        sys.exit(f"MLflow or Prefect did not answer within {_PATIENCE_S:.0f} s")
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _servers_answer(settings: Settings) -> bool:
    """Whether the servers answer in time. The store is not asked: it is there in a second."""
    end = time.monotonic() + _PATIENCE_S
    silent = [f"{settings.prefect_api_url}/health", str(settings.mlflow_uri)]
    silent = [address for address in silent if address.startswith("http")]  # MLflow may also be a database
    while silent:
        try:
            health.check_elsewhere(silent[-1])
        except health.UnhealthyError:
            if time.monotonic() > end:
                return False
            time.sleep(_POLL_S)
        else:
            silent.pop()
    return True


if __name__ == "__main__":
    main()
