"""The recipe: everything a user decides about a merge; and the fingerprint of a set under a recipe."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from hydraopt.precision import LOW_BITS
from hydraopt.strict_settings import StrictSettings

SOLVER_VERSION = "5"
"""Raised whenever the same adapters and recipe would give a different bundle."""

Method = Literal["hydraopt", "paper", "separate", "two-sided", "ta", "ties", "dare", "dare-ties", "gradient"]
Bits = Literal["auto", 32, 16, 8, 6, 4, 3, 2]
StoredDtype = Literal["bfloat16", "float16", "float32"]


MADE_FROM = frozenset({"shared_from", "calibration"})
"""Fields that a merge fills in: what it was made from beside the adapters."""

_DIGEST = r"^[0-9a-f]{64}$"

ADAPTIVE = ("hydraopt", "separate", "two-sided")
"""Methods whose ranks and precisions the budget chooses vector by vector."""

ONE_FOR_ALL = ("ta", "ties", "dare", "dare-ties")
"""Methods of one update for all tasks, of a given rank: no budget can change its size."""

METHODS_OF = {
    "budget": ("hydraopt", "paper", "separate", "two-sided", "gradient"),
    "max_error": ("hydraopt", "paper", "separate", "two-sided"),
    "rank": ("paper", "separate", "gradient", *ONE_FOR_ALL),
    "heads": ("paper", "gradient"),
    "on": ONE_FOR_ALL,
    "density": ("ties", "dare", "dare-ties"),
    "scale": ONE_FOR_ALL,
    "steps": ("gradient",),
    "calibration": ("hydraopt", "paper", "separate"),
}
"""Settings that not every method has, and the methods that have them."""

_DEFAULTS: dict[str, dict[str, str | float]] = {
    "ta": {"on": "dw", "scale": 1.0},
    "ties": {"on": "dw", "scale": 1.0, "density": 0.2},  # its paper's, where there are no validation data
    "dare": {"on": "dw", "scale": 1.0, "density": 0.5},  # its paper searches; half is common in practice
    "dare-ties": {"on": "dw", "scale": 1.0, "density": 0.5},
    "gradient": {"steps": 1000},
}
"""Settings of a method that stand in the recipe whether given or not."""


class Recipe(StrictSettings):
    """How to merge a set of adapters. The same recipe and adapters always give the same bundle."""

    method: Method = Field("hydraopt", description="Which families of factors may be used.")
    budget: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Bundle bytes as a share of the input bytes, in (0, 1].",
    )
    max_error: float | None = Field(
        None,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="Bound on the root of the weighted mean squared relative error over the tasks.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="Rows of the shared A' (`paper`, `gradient`), rank per task (`separate`) or rank of the one update "
        "(`ta`, `ties`, `dare`, `dare-ties`; None is the largest rank of an adapter).",
    )
    heads: int | None = Field(
        None, ge=1, description="Number of dense heads M (`paper`, `gradient`); None is one per task."
    )
    on: Literal["dw", "factors"] | None = Field(
        None, description="For methods of one update: whether entries of dW or of A and B apart are merged."
    )
    density: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Share of entries that stay (`ties`: the largest, 0.2; `dare`, `dare-ties`: at random, 0.5).",
    )
    scale: float | None = Field(
        None, allow_inf_nan=False, description="Multiplies the one update: the lambda of `ta` and `ties`."
    )
    steps: int | None = Field(None, ge=1, description="Steps of Adam (`gradient`).")
    bits: Bits = Field(
        "auto", description="Bits per stored number; `auto` trades them against ranks, vector by vector."
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="Relative weight of a task's error; 1 for those not named."
    )
    dtype: StoredDtype = Field("bfloat16", description="Float dtype of what is stored in 16 or 32 bits.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    shared_from: str | None = Field(
        None, pattern=_DIGEST, description="Id of the bundle whose shared part was kept; set by the merge."
    )
    calibration: str | None = Field(
        None,
        pattern=_DIGEST,
        description="Digest of the calibration data, if there was any; set by the merge.",
    )

    @field_validator("weights")
    @classmethod
    def _usable_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        for task, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"the weight of task {task!r} is {weight}; it must be finite and not negative"
                )
        return dict(sorted(weights.items()))

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, data: Any) -> Any:
        """What the method does stands in the recipe, whether it was asked for or not."""
        if not isinstance(data, dict):
            return data
        method = data.get("method")
        defaults = _DEFAULTS.get(method, {}) if isinstance(method, str) else {}
        return data | {name: value for name, value in defaults.items() if data.get(name) is None}

    @model_validator(mode="after")
    def _own_settings(self) -> Self:
        for name, methods in METHODS_OF.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(
                    f"{name} is not for the method {self.method!r}, but for {', '.join(methods)}"
                )
        if (self.dtype == "float32") != (self.bits == 32) and self.bits != "auto":
            raise ValueError(
                f"bits={self.bits} contradicts dtype={self.dtype!r}; float32 is stored in 32 bits"
            )
        return self

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        targets = {"budget": self.budget, "max_error": self.max_error, "rank": self.rank}
        given = [name for name, value in targets.items() if value is not None]
        able = [name for name in targets if self.method in METHODS_OF[name]]
        if len(given) > 1 or (not given and self.method not in ONE_FOR_ALL):
            raise ValueError(
                f"give exactly one of {', '.join(able)} for the method {self.method!r}; got {given or 'none'}"
            )
        return self

    @property
    def precisions(self) -> tuple[int, ...]:
        """Bits per number a stored vector may have, finest first."""
        if self.dtype == "float32":
            return (32,)
        if self.bits != "auto":
            return (self.bits,)
        return (16, *LOW_BITS) if self.method in ADAPTIVE else (16,)

    @property
    def families(self) -> tuple[str, ...]:
        """Families of factors the method may use."""
        return {
            "hydraopt": ("separate", "shared-a", "shared-b", "two-sided"),
            "two-sided": ("two-sided",),
            "separate": ("separate",),
        }.get(self.method, ("dense-heads",))


def set_fingerprint(
    base_model: str,
    revision: str | None,
    adapters: Mapping[str, str],
    recipe: Recipe,
    *,
    keep_shared: bool = False,
) -> str:
    """SHA-256 (hex) of an adapter set under a recipe: equal exactly when the merge would be the same.

    A merge that keeps the shared part of what is live depends on that, too. It is named in the bundle's own recipe;
    the set belongs to the first bundle made of it.

    Args:
        base_model: Name of the frozen base model.
        revision: Its revision, if the adapters name one.
        adapters: Adapter digest (hex) by task name; the order is irrelevant.
        recipe: How to merge.
        keep_shared: Whether the shared part of a live bundle may be kept.
    """
    canonical = json.dumps(
        ({"keep_shared": True} if keep_shared else {})
        | {
            "solver": SOLVER_VERSION,
            "base_model": base_model,
            "revision": revision,
            "adapters": dict(adapters),
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).hexdigest()
