"""The flow ``rollback``: a channel goes back to a former version."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.artifacts import show_move
from tasks.log_lines import on_every_line, say
from tasks.releasing import (
    choose_former_version,
    move_back,
    names_of_live,
    names_of_version,
    show_live,
)
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
    with on_every_line(settings, whole_run=True, **names_of_live(settings, bundle, channel)):
        check_store(settings)
        version = choose_former_version(settings, bundle, channel) if to is None else to
        with on_every_line(settings, whole_run=True, **names_of_version(settings, bundle, version)):
            published = move_back(settings, bundle, channel, version)
            show_live(settings, bundle, channel)
            show_move(published)
            say("version %s is live in channel %s", published.live_version, channel)
    return published.model_dump(mode="json")
