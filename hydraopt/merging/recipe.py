"""The recipe: everything a user decides about a merge; and the fingerprint of a set under a recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

SOLVER_VERSION = "1"
"""Raised whenever the same adapters and recipe would give a different bundle."""

Method = Literal["hydraopt", "paper", "separate"]
StoredDtype = Literal["bfloat16", "float16", "float32"]


class Recipe(BaseModel):
    """How to merge a set of adapters. The same recipe and adapters always give the same bundle."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field("hydraopt", description="Which families of factors may be used.")
    budget: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Bundle bytes as a share of the input bytes, in (0, 1].",
    )
    max_error: float | None = Field(
        None, ge=0, lt=1, allow_inf_nan=False, description="Relative squared error that must not be exceeded."
    )
    rank: int | None = Field(
        None, ge=1, description="Rows of the shared A' (`paper`) or rank per task (`separate`)."
    )
    heads: int | None = Field(
        None, ge=1, description="Number of dense heads M (`paper`); None is one per task."
    )
    dtype: StoredDtype = Field("bfloat16", description="How the bundle stores its factors.")
    seed: int = Field(0, ge=0, description="Seed of every random choice.")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        targets = {"budget": self.budget, "max_error": self.max_error, "rank": self.rank}
        given = [name for name, value in targets.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of budget, max_error and rank; got {given or 'none'}")
        if self.rank is not None and self.method == "hydraopt":
            raise ValueError(
                "rank is for the methods 'paper' and 'separate'; 'hydraopt' takes budget or max_error"
            )
        if self.heads is not None and self.method != "paper":
            raise ValueError(f"heads is for the method 'paper', not {self.method!r}")
        return self


def set_fingerprint(
    base_model: str, revision: str | None, adapters: Mapping[str, str], recipe: Recipe
) -> str:
    """SHA-256 (hex) of an adapter set under a recipe: equal exactly when the merge would be the same.

    Args:
        base_model: Name of the frozen base model.
        revision: Its revision, if the adapters name one.
        adapters: Adapter digest (hex) by task name; the order is irrelevant.
        recipe: How to merge.
    """
    canonical = json.dumps(
        {
            "solver": SOLVER_VERSION,
            "base_model": base_model,
            "revision": revision,
            "adapters": dict(adapters),
            "recipe": recipe.model_dump(mode="json"),
        },
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).hexdigest()
