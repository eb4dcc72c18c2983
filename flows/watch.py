"""The flow ``watch``: tell people what they should know, reconcile's silence included."""

from __future__ import annotations

from prefect import flow

from infra.settings import Settings
from tasks.notifying import due_notices, tell


@flow(name="watch")
def watch() -> list[str]:
    """Send what is due to those whom ``notifications.yaml`` names; returns the subjects.

    It runs by a schedule of its own: a reconcile that hangs or fails cannot say so itself.
    """
    settings = Settings.load().require_services()
    told = []
    for notice in due_notices(settings):
        tell(settings, notice)
        told.append(notice.subject)
    return told
