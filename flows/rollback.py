"""The flow ``rollback``: a channel goes back to a former version."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.artifacts import show_move
from tasks.releasing import choose_former_version, move_back, show_live
from tasks.store import check_store


@flow(name="rollback", flow_run_name="roll back {bundle}")
def rollback(bundle: str, channel: str = "stable", to: int | None = None) -> dict[str, Any]:
    """Point the channel at a version that was live before, then bring MLflow's aliases along.

    Args:
        bundle: Name of the bundle.
        channel: The pointer that devices follow.
        to: The version; None is the one before the live one.
    """
    settings = Settings.load().require_services()
    check_store(settings)
    version = choose_former_version(settings, bundle, channel) if to is None else to
    published = move_back(settings, bundle, channel, version)
    show_live(settings, bundle, channel)
    show_move(published)
    return published.model_dump(mode="json")
