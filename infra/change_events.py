"""What the orchestrator is told when the adapters of a base model may have changed.

A hint and no more: events get lost, and only the first of many reaches the run it starts. So they carry nothing
that reconcile would believe; it reads the registry itself, and its schedule finds what no event told.
"""

from __future__ import annotations

from typing import Any

from hydraopt.names import slug

SET_CHANGED = "hydraopt.adapter-set.changed"
"""Name of the event."""

_RESOURCE = "hydraopt.base-model."


def set_changed(base_model: str, task: str, because: str) -> dict[str, Any]:
    """The event, as Prefect's API takes it (without its id and time).

    Args:
        base_model: The base model whose adapter set may have changed; the event's resource.
        task: The task whose adapter did.
        because: What happened, for people: ``registered``, ``alias created``.
    """
    return {
        "event": SET_CHANGED,
        "resource": {
            "prefect.resource.id": _RESOURCE + slug(base_model),
            "prefect.resource.name": base_model,
        },
        "payload": {"base_model": base_model, "task": task, "because": because},
    }
