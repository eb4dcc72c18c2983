"""The flow ``promote``: what one channel shows goes live on another one."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.artifacts import show_move
from tasks.log_lines import on_every_line, say
from tasks.releasing import names_of_live, promote_live, show_live
from tasks.store import check_store


@flow(name="promote", flow_run_name="promote {bundle} to {target}")
def promote(
    bundle: str, source: str = "canary", target: str = "stable", by: str | None = None
) -> dict[str, Any]:
    """Verify the approvals of what is live on ``source`` again, and publish it to ``target``.

    Args:
        bundle: Name of the bundle.
        source: The channel it proved itself on.
        target: The channel that gets it.
        by: Who asked for it, for people.
    """
    settings = Settings.load().require_services()
    with on_every_line(settings, whole_run=True, **names_of_live(settings, bundle, source)):
        check_store(settings)
        published = promote_live(settings, bundle, source, target, by)
        show_live(settings, bundle, target)
        show_move(published)
        say("version %s is live in channel %s", published.live_version, target)
    return published.model_dump(mode="json")
