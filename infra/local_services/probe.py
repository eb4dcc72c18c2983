"""A container's health check: ``python -m infra.local_services.probe SERVICE ADDRESS`` ends with 0 or says why not.

The same question that ``hydraopt status`` asks. Passwords come from the variables that the service has anyway.
"""

from __future__ import annotations

import os
import sys

from infra.local_services import health
from infra.local_services.pools import POOLS, service_of
from infra.settings import ADMIN


def probe(service: str, address: str) -> None:
    """Ask the service at ``address``, or for a worker the Prefect server there.

    Raises:
        UnhealthyError: If it does not work.
    """
    prefect_login = os.environ.get("PREFECT_API_AUTH_STRING")
    if service == "mlflow":
        password = os.environ.get("MLFLOW_AUTH_ADMIN_PASSWORD")
        health.check_mlflow(address, f"{ADMIN}:{password}" if password else None)
    elif service == "prefect":
        health.check_prefect(address, prefect_login)
    else:
        pool = {service_of(pool): pool for pool in POOLS}[service]
        health.check_worker(address, service, pool, 0.0, prefect_login)


def main() -> None:
    """Ask once."""
    try:
        probe(*sys.argv[1:])
    except health.UnhealthyError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
