"""Which bundles a deployment keeps: YAML files in ``<home>/bundles``, and a default for every other base model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.gates import GateRules
from hydraopt.evaluation.yaml_file import explain, read_yaml
from hydraopt.names import check_name, check_task_name, slug
from hydraopt.recipe import MADE_FROM, Recipe
from hydraopt.strict_settings import StrictSettings
from infra.approval_policy import ApprovalPolicy

FOLDER = "bundles"
"""Where the files lie, below the home folder."""

DEFAULT_BUDGET = 0.25
_SUFFIXES = {".yaml", ".yml"}


class BundleSpec(StrictSettings):
    """One bundle to keep up to date: what goes in, how it is merged, what it must pass, where it goes.

    A file needs no more than ``name`` and ``base_model``.
    """

    name: str = Field(description="Name of the bundle.")
    base_model: str = Field(min_length=1, description="Base model, spelt as the adapters spell it.")
    tasks: tuple[str, ...] | None = Field(
        None, description="Its tasks; None: all that have a serving adapter."
    )
    recipe: Recipe = Field(default_factory=lambda: Recipe(budget=DEFAULT_BUDGET), description="How to merge.")
    keep_shared: bool = Field(
        False,
        description="Keep the shared part of the live bundle, so that devices fetch the changed tasks' files alone; "
        "merged afresh where that is not possible or a changed task fits it badly.",
    )
    gates: GateRules = Field(default_factory=GateRules, description="What a candidate must pass.")
    channel: str = Field("stable", description="Where an approved bundle is published.")
    approval: ApprovalPolicy | None = Field(
        None, description="Who must approve; None: one person whose key is trusted."
    )

    @model_validator(mode="before")
    @classmethod
    def _gate_follows_budget(cls, data: Any) -> Any:
        """Unless it is given, the largest storage ratio is the budget: asking for 0.3 means 0.3 may pass."""
        if not isinstance(data, dict):
            return data
        recipe, gates = data.get("recipe"), data.get("gates", {})
        budget = recipe.get("budget") if isinstance(recipe, dict) else getattr(recipe, "budget", None)
        if isinstance(budget, int | float) and isinstance(gates, dict) and "max_storage_ratio" not in gates:
            return {**data, "gates": {**gates, "max_storage_ratio": budget}}
        return data

    @field_validator("recipe")
    @classmethod
    def _only_decisions(cls, recipe: Recipe) -> Recipe:
        if filled := sorted(name for name in MADE_FROM if getattr(recipe, name) is not None):
            raise ValueError(f"{filled[0]} is what a merge fills in, not a setting; leave it out")
        return recipe

    @field_validator("name")
    @classmethod
    def _safe_name(cls, name: str) -> str:
        return check_name(name, "bundle name")

    @field_validator("channel")
    @classmethod
    def _safe_channel(cls, channel: str) -> str:
        return check_name(channel, "channel")

    @field_validator("tasks")
    @classmethod
    def _safe_tasks(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if tasks is None:
            return None
        if not tasks:
            raise ValueError("a bundle needs a task; leave the key out for all tasks of the base model")
        if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
            raise ValueError(f"named twice: {', '.join(twice)}")
        return tuple(check_task_name(task) for task in tasks)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read one file.

        Raises:
            TaskFileError: If it cannot be read, or a key is unknown or its value not allowed; names both.
        """
        try:
            return cls.model_validate(read_yaml(Path(path)))
        except ValidationError as error:
            raise TaskFileError(f"{path}: {explain(error)}") from None

    @classmethod
    def default(cls, base_model: str) -> Self:
        """The bundle of a base model that no file describes, named after the last part of the model's name."""
        name = re.sub(r"\.{2,}", ".", slug(base_model.replace("\\", "/").rstrip("/").rpartition("/")[2]))
        return cls.model_validate({"name": name[:100].strip(".-") or "bundle", "base_model": base_model})


def load_specs(home: Path) -> tuple[BundleSpec, ...]:
    """The bundles described below ``home``, by name; none if there is no such folder.

    Raises:
        TaskFileError: If a file cannot be used, or two describe a bundle of the same name.
    """
    files: dict[str, Path] = {}
    specs = []
    for path in _files(home / FOLDER):
        spec = BundleSpec.load(path)
        # Not told apart by case: some disks would put the two into one folder.
        first = files.setdefault(spec.name.lower(), path)
        if first is not path:
            raise TaskFileError(f"{path}: bundle {spec.name!r} is already described by {first}: rename one")
        specs.append(spec)
    return tuple(sorted(specs, key=lambda spec: spec.name))


def desired_specs(home: Path, base_models: Iterable[str]) -> tuple[BundleSpec, ...]:
    """Every bundle to keep up to date, by name: the described ones, and a default for each other base model.

    Args:
        home: Home folder.
        base_models: Base models that have a serving adapter.

    Raises:
        TaskFileError: If a file cannot be used, or a default would take a name that is taken.
    """
    specs = list(load_specs(home))
    described = {spec.base_model for spec in specs}
    for base_model in sorted(set(base_models) - described):
        spec = BundleSpec.default(base_model)
        _check_is_new(spec, specs, home)
        specs.append(spec)
    return tuple(sorted(specs, key=lambda spec: spec.name))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise TaskFileError(f"{folder}: cannot be read ({error.strerror})") from None


def _check_is_new(spec: BundleSpec, specs: Sequence[BundleSpec], home: Path) -> None:
    """Two base models under one bundle name would overwrite each other's candidates."""
    for other in specs:
        if other.name.lower() == spec.name.lower():
            raise TaskFileError(
                f"base models {other.base_model!r} and {spec.base_model!r} both lead to a bundle named "
                f"{spec.name!r}: describe one in a file in {home / FOLDER}, under another name"
            )
