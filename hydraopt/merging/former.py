"""What a former bundle asks of a merge that keeps its shared part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hydraopt.adapters import Adapter
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.layout import Manifest, ModuleEntry
from hydraopt.errors import AdapterMismatchError, BundleError


def kept_settings(former: Bundle, given: Mapping[str, object], tasks: Iterable[str]) -> dict[str, object]:
    """The settings of the recipe of a merge that keeps the former bundle's shared part.

    Args:
        former: The bundle.
        given: Settings asked for. A budget and weights may differ; anything else must be as it was.
        tasks: The new set.

    Raises:
        BundleError: If another setting differs, or the former method cannot be continued.
    """
    old = former.manifest.recipe
    for name, value in given.items():
        if name not in {"budget", "weights", "calibration"} and value != getattr(old, name):
            raise BundleError(
                f"{name}={value!r} contradicts the bundle whose shared part is kept, which has {getattr(old, name)!r}; "
                "leave it out, or merge afresh, without keep_shared"
            )
    if any(module.groups for module in former.manifest.modules):
        raise BundleError(
            "tasks of the former bundle share dense heads, which its shared part holds: a changed task may belong to "
            "another group; merge afresh, without keep_shared"
        )
    if old.method == "gradient":
        raise BundleError(
            "the former bundle's heads were fitted by Adam together with its shared part, and those of a changed task "
            "would not be; merge afresh, without keep_shared"
        )
    changes = {"heads": None, "calibration": None, "shared_from": former.id}  # heads None: one for each task
    settings: dict[str, object] = old.model_dump() | changes | dict(given)
    if "budget" in given:
        settings |= {"max_error": None, "rank": None}
    present = set(tasks)
    if "weights" not in given:
        settings["weights"] = {task: weight for task, weight in old.weights.items() if task in present}
    return settings


def check_fits(former: Manifest, adapters: Mapping[str, Adapter]) -> None:
    """Check that the adapters can live on the former bundle's shared part.

    Raises:
        AdapterMismatchError: If they belong to another base model, or one updates a module the bundle does not have, or
            has otherwise.
    """
    known = {module.name: module for module in former.modules}
    base = former.base_model
    for task, adapter in adapters.items():
        for what, found, expected in (
            ("base model", adapter.base_model, base.name),
            ("base model revision", adapter.revision, base.revision),
        ):
            if found != expected:
                raise AdapterMismatchError(
                    f"task {task!r} has {what} {found!r}, but the bundle whose shared part is kept has {expected!r}"
                )
        _check_modules(task, adapter, known)


def _check_modules(task: str, adapter: Adapter, known: Mapping[str, ModuleEntry]) -> None:
    for name, module in adapter.modules.items():
        if name not in known:
            raise AdapterMismatchError(
                f"task {task!r} updates the module {name!r}, which the bundle whose shared part is kept does not "
                "have; merge afresh, without keep_shared"
            )
        found, expected = (module.d_out, module.d_in, module.layer), (*known[name].shape, known[name].layer)
        if found != expected:
            raise AdapterMismatchError(
                f"module {name!r}: task {task!r} updates it as {found}, but the bundle whose shared part is kept has "
                f"{expected} (d_out, d_in and layer). Were both made for the same base model?"
            )
