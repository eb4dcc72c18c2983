"""What the adapters of the quality benchmark answer to their test rows: one base model, updates added to its weights.

Answers are kept by the digest of everything they depend on, so a merge that gives the same numbers again is not
evaluated again, and a run that was cut short goes on where it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_tasks import BASE_MODEL, spread
from torch import Tensor

from hydraopt import Adapter, Bundle
from hydraopt.base_models import load_base
from hydraopt.evaluation.encoding import classification_examples
from hydraopt.evaluation.task_file import TaskFile

_BATCH = 32  # on one core larger batches are no faster
_UNUSABLE = -1  # the answer where a logit is not finite: never right
_PREFIX = "base_model.model."


class Scorer:
    """Answers of a classifier with one task's update in place.

    Args:
        tasks: The tasks by name.
        limit: Test rows per task, spread evenly over all; None uses all.
        folder: Where answers are kept.
    """

    def __init__(self, tasks: Mapping[str, TaskFile], limit: int | None, folder: Path) -> None:
        use_fastest_exact_products()
        base = load_base(BASE_MODEL, None, "SEQ_CLS", num_labels=2)
        self._model = base.model
        self._weights: dict[str, Tensor] = {}
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._inputs: dict[str, list[dict[str, Tensor]]] = {}
        self._order: dict[str, list[int]] = {}
        self.truth: dict[str, np.ndarray] = {}
        self._pad = base.tokenizer
        for name, task in tasks.items():
            rows = spread(task.read_rows("test"), limit)
            self._add_rows(name, classification_examples(task, self._model, base.tokenizer, rows))
            self.truth[name] = np.array([task.labels.index(row["label"]) for row in rows])

    def _add_rows(self, task: str, examples: list[dict[str, list[int]]]) -> None:
        """Batches of rows of like length."""
        order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
        self._order[task] = order
        self._inputs[task] = [
            dict(
                self._pad.pad(
                    [examples[row] for row in order[start : start + _BATCH]],
                    padding_side="right",
                    return_tensors="pt",
                )
            )
            for start in range(0, len(order), _BATCH)
        ]

    def adapter(self, task: str, adapter: Adapter) -> np.ndarray:
        """Answers with the task's own adapter: label indices in the order of the rows."""
        factors = {name: adapter.factors(name) for name in adapter.modules}
        return self._answers(task, factors, {name: adapter.extra(name) for name in adapter.extras})

    def bundle(self, task: str, bundle: Bundle) -> np.ndarray:
        """Answers with the task's part of a bundle: label indices in the order of the rows."""
        return self._answers(task, bundle.factors(task), bundle.extras(task))

    def _answers(
        self, task: str, factors: Mapping[str, tuple[Tensor, ...]], extras: Mapping[str, Tensor]
    ) -> np.ndarray:
        file = self._folder / f"{self._key(task, factors, extras)}.json"
        if not file.is_file():
            with torch.inference_mode():
                self._put(factors, extras)
                answers = self._predict(task)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(answers), encoding="utf-8")
            partial.rename(file)
        return np.array(json.loads(file.read_text(encoding="utf-8")))

    def _key(self, task: str, factors: Mapping[str, tuple[Tensor, ...]], extras: Mapping[str, Tensor]) -> str:
        digest = hashlib.sha256(BASE_MODEL.encode())
        for batch in self._inputs[task]:
            digest.update(batch["input_ids"].numpy().tobytes())
        named = [(name, part) for name, parts in sorted(factors.items()) for part in parts]
        for name, tensor in [*named, *sorted(extras.items())]:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().clone(memory_format=torch.contiguous_format).flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:40]

    def _put(self, factors: Mapping[str, tuple[Tensor, ...]], extras: Mapping[str, Tensor]) -> None:
        """Base weights plus the update, and the layers the adapter brings."""
        for name, weight in self._weights.items():
            self._module(name).weight.data = weight
        for name, parts in factors.items():
            module = self._module(name)
            base = self._weights.setdefault(name, module.weight.data)
            module.weight.data = base + functools.reduce(torch.matmul, [part.float() for part in parts])
        for name, tensor in extras.items():
            path, leaf = name.removeprefix(_PREFIX).rsplit(".", 1)
            setattr(self._module(path), leaf, torch.nn.Parameter(tensor.float(), requires_grad=False))

    def _module(self, name: str) -> Any:
        return self._model.get_submodule(name)

    def _predict(self, task: str) -> list[int]:
        sorted_answers: list[int] = []
        for batch in self._inputs[task]:
            logits = self._model(**batch).logits  # (batch, labels)
            best = torch.where(logits.isfinite().all(dim=1), logits.argmax(dim=1), _UNUSABLE)
            sorted_answers += best.tolist()
        by_row = dict(zip(self._order[task], sorted_answers, strict=True))
        return [by_row[row] for row in range(len(by_row))]


def use_fastest_exact_products() -> None:
    """Let torch take the other library's matrix products where these are as exact: on some processors twice as fast.

    Asked for ``medium`` precision, torch hands float32 products to oneDNN. That may shorten numbers to bfloat16, which
    shows in the error and is not what we want, or work in float32.
    """
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 384, generator=random), torch.randn(384, 384, generator=random)
    exact = x.double() @ weight.double().T
    errors = {}
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        with torch.inference_mode():
            errors[precision] = float((torch.nn.functional.linear(x, weight).double() - exact).abs().max())
    if errors["medium"] > 3 * errors["highest"]:  # bfloat16 is some thousand times worse
        torch.set_float32_matmul_precision("highest")
