"""A task file: one job with its data, base model, prompt, metric and training settings, as YAML.

```yaml
name: support-intents
application: intent classification
language: en
base_model: sentence-transformers/all-MiniLM-L6-v2
kind: classification
labels: [refund, delivery, other]
data:
  train: data/train.jsonl
  test: data/test.jsonl
```
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from hydraopt.base_models import TaskType, generation_task_type
from hydraopt.errors import TaskFileError
from hydraopt.evaluation.rows import (
    Kind,
    Row,
    check_rows,
    read_hub_split,
    read_json_lines,
    rows_digest,
)
from hydraopt.evaluation.yaml_file import explain, read_yaml
from hydraopt.names import check_task_name
from hydraopt.strict_settings import StrictSettings

Split = Literal["train", "validation", "test"]
MetricName = Literal["accuracy", "macro_f1", "exact_match", "rouge_l"]

METRICS_OF_KIND: dict[Kind, tuple[MetricName, ...]] = {
    "classification": ("accuracy", "macro_f1"),
    "generation": ("exact_match", "rouge_l"),
}
"""The metrics that make sense for each kind of task."""
# The fields' own defaults are for classification with a small encoder; a language model learns at lower rates.
_GENERATION_DEFAULTS: dict[str, Any] = {
    "metric": "rouge_l",
    "max_length": 512,
    "lora": {"alpha": 32.0},
    "training": {"epochs": 3, "batch_size": 16, "learning_rate": 2e-4},
}

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]
Language = Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")]


class HubSource(StrictSettings):
    """A data set on the hub, or a local folder of data files, as ``datasets.load_dataset`` takes it."""

    name: Words = Field(description="Hub id of the data set.")
    config: Words | None = Field(None, description="Name of its configuration, if it has several.")
    revision: Words | None = Field(
        None, description="Commit, branch or tag; a commit makes the task repeatable."
    )
    train: Words | None = Field("train", description="Name of the split to train on.")
    validation: Words | None = Field(None, description="Name of the split to tune on.")
    test: Words = Field("test", description="Name of the split to evaluate on.")


class DataSource(StrictSettings):
    """Where the examples are, and what their fields are called."""

    train: Path | None = Field(None, description="Rows to train on, `.jsonl` or `.jsonl.gz`.")
    validation: Path | None = Field(None, description="Rows to tune on.")
    test: Path | None = Field(None, description="Rows to evaluate on.")
    hub: HubSource | None = Field(None, description="A data set instead of files.")
    text: Words = Field("text", description="Field of the text to classify.")
    label: Words = Field("label", description="Field of its label.")
    input: Words = Field("input", description="Field of the text the prompt is made from.")
    target: Words = Field("target", description="Field of the right answer, or of a list of right answers.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        files = [name for name in ("train", "validation", "test") if getattr(self, name) is not None]
        if self.hub is not None and files:
            raise ValueError(f"give either hub or files, not both; files are given for {', '.join(files)}")
        return self


class LoraSettings(StrictSettings):
    """The shape of the adapter."""

    r: int = Field(16, ge=1, le=1024, description="Rank.")
    alpha: float = Field(64.0, gt=0, allow_inf_nan=False, description="Scaling: alpha / r multiplies B A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of a module's inputs dropped in training.")
    target_modules: Literal["all-linear"] | tuple[Words, ...] = Field(
        "all-linear", description="Names of the linear modules to adapt, or all of them."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead.")
    init_seed: int = Field(
        0,
        ge=0,
        le=2**32 - 1,
        description="Seed of A. Tasks that share it start from one A, which is what makes them merge well.",
    )
    freeze_a: bool = Field(
        False,
        description="Train B alone (LoRA-FA, Zhang et al., arXiv 2308.03303): tasks of one init_seed then end with the "
        "very same A, of which a bundle keeps one.",
    )


class TrainingSettings(StrictSettings):
    """How the adapter is trained."""

    epochs: int = Field(5, ge=1, le=10_000, description="Passes over the training rows.")
    batch_size: int = Field(8, ge=1, le=4096, description="Rows per step.")
    learning_rate: float = Field(
        1e-3, gt=0, allow_inf_nan=False, description="Highest learning rate of AdamW."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the row order and of dropout.")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Share of the steps until the highest rate.")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="AdamW's weight decay.")
    nuclear_decay: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Every step takes this times the learning rate off each singular value of B, so that adapters end "
        "with a low rank of their own, which merges with less loss but takes more steps. Only with lora.freeze_a.",
    )


class TaskFile(StrictSettings):
    """One task. Made by :meth:`load` from YAML, or by :meth:`from_definition` from a stored definition."""

    name: Annotated[str, AfterValidator(check_task_name)] = Field(description="Name of the task.")
    application: Words = Field(description="What it is for, such as `intent classification`.")
    language: Language = Field(description="Language tag, such as `en` or `pt-BR`.")
    base_model: Words = Field(description="Hub id or local folder of the frozen base model.")
    revision: Words | None = Field(None, description="Revision of the base model on the hub.")
    kind: Kind = Field(description="Choose a label, or write text.")
    labels: tuple[Words, ...] = Field((), description="The labels; the model's output i stands for the i-th.")
    data: DataSource = Field(description="The examples.")
    prompt: str = Field("{input}", description="Template of the prompt; `{input}` becomes the row's input.")
    metric: MetricName = Field("accuracy", description="The number the gates look at.")
    max_length: int = Field(
        128, ge=8, le=131_072, description="Longest input in tokens; the rest is cut off."
    )
    max_new_tokens: int = Field(64, ge=1, le=8192, description="Longest answer in tokens.")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="The shape of the adapter.")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="How it is trained.")

    _folder: Path = PrivateAttr(default=Path())

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("kind") != "generation":
            return values
        filled = _GENERATION_DEFAULTS | values
        for group in ("lora", "training"):
            if isinstance(filled[group], dict):
                filled[group] = _GENERATION_DEFAULTS[group] | filled[group]
        return filled

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        allowed = METRICS_OF_KIND[self.kind]
        if self.metric not in allowed:
            raise ValueError(f"metric {self.metric!r} is not for {self.kind}; use {' or '.join(allowed)}")
        if self.training.nuclear_decay and not self.lora.freeze_a:
            raise ValueError(
                f"training.nuclear_decay {self.training.nuclear_decay:g} is for B alone: an A that is trained, too, "
                "would take over what B loses; set lora.freeze_a: true, or leave it out"
            )
        if self.kind == "generation":
            if self.labels:
                raise ValueError("labels are for classification; a generation task has none")
            if "{input}" not in self.prompt:
                raise ValueError(
                    f"prompt {self.prompt!r} does not hold {{input}}, so every prompt would be the same"
                )
            return self
        if len(self.labels) < 2:
            raise ValueError(f"classification needs at least 2 labels, got {len(self.labels)}")
        if twice := sorted({label for label in self.labels if self.labels.count(label) > 1}):
            raise ValueError(f"labels named twice: {twice}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> TaskFile:
        """Read a task file; the paths of its data are relative to it.

        Raises:
            TaskFileError: If it cannot be read; the message names the file, the field and the value.
        """
        path = Path(path)
        try:
            task = cls.model_validate(read_yaml(path))
        except ValidationError as reason:
            raise TaskFileError(f"{path}: {explain(reason)}") from reason
        if task.data.hub is None and task.data.test is None:
            raise TaskFileError(f"{path}: data.test is missing: give a file of test rows, or data.hub")
        task._folder = path.parent  # noqa: SLF001 - our own
        return task

    @classmethod
    def from_definition(cls, definition: dict[str, Any]) -> TaskFile:
        """The task a :meth:`definition` describes. It has no local files, so rows are passed in beside it.

        Raises:
            TaskFileError: If the definition is not one.
        """
        try:
            return cls.model_validate({"data": {}, **definition})
        except (ValidationError, TypeError) as reason:
            detail = explain(reason) if isinstance(reason, ValidationError) else str(reason)
            raise TaskFileError(f"stored task definition: {detail}") from reason

    def definition(self) -> dict[str, Any]:
        """Everything that defines the job, as JSON values; no local path of its data.

        What the rows are is told by :meth:`data_digest`; a hub source is kept, since others can read it.
        """
        values = self.model_dump(mode="json")
        if self.data.hub is None:
            del values["data"]
        return values

    def task_type(self) -> TaskType:
        """PEFT's name of the kind of model the task runs on.

        Raises:
            TaskFileError: If it depends on the base model's configuration, and that cannot be read.
        """
        if self.kind == "classification":
            return "SEQ_CLS"
        return generation_task_type(self.base_model, self.revision)

    def read_rows(self, split: Split) -> list[Row]:
        """The rows of one split in canonical form (see :mod:`hydraopt.evaluation.rows`).

        Raises:
            TaskFileError: If the task has no such split, or a row is wrong; the message names its line.
        """
        raw = self._raw_rows(split)
        rows = check_rows(raw, self.kind, self._fields, self.labels)
        if not rows:
            raise TaskFileError(f"task {self.name!r}: its {split} data holds no rows")
        return rows

    def check_rows(self, rows: list[Row]) -> list[Row]:
        """``rows`` in canonical form, if they fit the task; for rows that come from elsewhere.

        Raises:
            TaskFileError: If there are none, or one does not fit.
        """
        fields = ("text", "label") if self.kind == "classification" else ("input", "target")
        named = ((f"task {self.name!r}, row {index}", row) for index, row in enumerate(rows))
        checked = check_rows(named, self.kind, fields, self.labels)
        if not checked:
            raise TaskFileError(f"task {self.name!r}: no rows to work on")
        return checked

    def data_digest(self, split: Split) -> str:
        """SHA-256 (hex) of the split's canonical rows: equal for equal rows, wherever they are kept."""
        return rows_digest(self.read_rows(split))

    @property
    def _fields(self) -> tuple[str, str]:
        if self.kind == "classification":
            return self.data.text, self.data.label
        return self.data.input, self.data.target

    def _raw_rows(self, split: Split) -> Any:
        hub = self.data.hub
        source = getattr(hub or self.data, split)
        if source is None:
            raise TaskFileError(
                f"task {self.name!r} has no {split} data; name it in its task file as data.{split}"
            )
        if hub is not None:
            return read_hub_split(hub.name, hub.config, hub.revision, source)
        return read_json_lines(self._folder / source)
