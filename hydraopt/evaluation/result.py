"""What a measurement found. A module of its own: who only reads results need not load what makes them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

EVALUATION_RULES = "2"
"""Raised whenever the same model, task and rows would score otherwise: measurements compare under equal rules only."""


class Evaluation(BaseModel):
    """What one model scored on one task's rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="Name of the task.")
    metric: str = Field(description="The metric the gates look at.")
    value: float = Field(description="Its value in [0, 1].")
    low: float = Field(description="Lower end of its 95 % interval.")
    high: float = Field(description="Upper end of its 95 % interval.")
    samples: int = Field(ge=1, description="Rows evaluated.")
    metrics: dict[str, float] = Field(
        description="All metrics of its kind, and the share of rows without output."
    )
    data_digest: str = Field(description="SHA-256 (hex) of the canonical rows evaluated.")
    rules: str = Field(
        "1", description="The EVALUATION_RULES it was measured under; the first ones did not say so."
    )
