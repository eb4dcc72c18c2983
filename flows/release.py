"""The flow ``release``: a signed-off candidate goes live."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.artifacts import show_move
from tasks.log_lines import on_every_line, say
from tasks.releasing import check_sign_off, names_of, publish_bundle, show_live
from tasks.store import check_store


@flow(name="release", flow_run_name="release {bundle} {bundle_id}")
def release(bundle: str, bundle_id: str, channel: str = "stable") -> dict[str, Any]:
    """Verify the approvals with all they rest on, publish, move the channel, then MLflow's aliases.

    A bundle gets one version number whatever happens, and a repeated release never undoes a rollback.

    Args:
        bundle: Name of the bundle.
        bundle_id: Its whole id.
        channel: The pointer that devices follow.
    """
    settings = Settings.load().require_services()
    with on_every_line(settings, whole_run=True, **names_of(settings, bundle, bundle_id)):
        check_store(settings)
        sign_off = check_sign_off(settings, bundle, bundle_id)
        published = publish_bundle(settings, bundle, bundle_id, channel)
        show_live(settings, bundle, channel)
        show_move(published)
        say("version %s is live in channel %s", published.live_version, channel)
    return {**published.model_dump(mode="json"), "approved_by": ", ".join(sign_off.by)}
