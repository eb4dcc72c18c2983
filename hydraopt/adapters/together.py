"""Which adapters can live in one bundle, as far as their kinds go."""

from __future__ import annotations

from collections.abc import Mapping

from hydraopt.adapters.peft_folder import Adapter
from hydraopt.errors import AdapterMismatchError


def check_kinds(adapters: Mapping[str, Adapter]) -> None:
    """Check that the updates of one module mean the same, and that VeRA tasks share their projections.

    Raises:
        AdapterMismatchError: Naming the tasks and what they disagree about.
    """
    layers: dict[str, tuple[str, str]] = {}
    vera: tuple[str, Adapter] | None = None
    for task, adapter in adapters.items():
        for name, module in adapter.modules.items():
            other, layer = layers.setdefault(name, (task, module.layer))
            if module.layer != layer:
                raise AdapterMismatchError(
                    f"module {name!r}: task {task!r} updates it as {module.layer}, but task {other!r} as {layer}. "
                    "Were both trained on the same base model?"
                )
        if adapter.kind == "VERA":
            vera = vera or (task, adapter)
            for setting in ("projection_prng_key", "r"):
                found, expected = adapter.settings[setting], vera[1].settings[setting]
                if found != expected:
                    raise AdapterMismatchError(
                        f"task {task!r} is a VeRA with {setting}={found}, but task {vera[0]!r} has {expected}; VeRA "
                        "tasks of one bundle share their projections: merge them separately"
                    )
