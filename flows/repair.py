"""The flow ``repair``: MLflow and Prefect show again what the object store holds."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.repairing import show_adapters_again, show_artifacts_again, show_bundles_again
from tasks.store import check_store


@flow(name="repair")
def repair() -> dict[str, Any]:
    """Rebuild what the two databases showed: adapters and which serve, bundles with scores, aliases, artifacts.

    Deployments and work pools come back with the processes that execute them. Safe to repeat and to kill.
    """
    settings = Settings.load().require_services()
    check_store(settings)
    adapters, serving = show_adapters_again(settings)
    bundles, channels = show_bundles_again(settings)
    reports = show_artifacts_again(settings)
    return {
        "adapters": adapters,
        "serving_brought_back": serving,
        "bundles": bundles,
        "channels": channels,
        "reports": reports,
    }
