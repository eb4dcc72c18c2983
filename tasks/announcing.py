"""Tell whoever waits for it that an adapter set has changed."""

from __future__ import annotations

from prefect.events import emit_event

from infra.adapter_store import AdapterVersion
from infra.change_events import set_changed


def announce(version: AdapterVersion) -> None:
    """Send the event that starts a reconcile soon. Never fails, and may get lost: the schedule looks, too."""
    emit_event(**set_changed(version.base_model, version.task, "registered"))
