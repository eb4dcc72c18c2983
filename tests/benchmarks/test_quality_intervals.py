"""The drops and intervals the quality benchmark reports."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode adds no folder by itself

from quality_intervals import Resamples, drops


def answers(rights: dict[str, list[float]], rows: int = 400) -> dict[str, np.ndarray]:
    """Booleans (seeds, rows) with those shares of right answers, in random places."""
    random = np.random.default_rng(1)
    return {
        task: np.stack([random.permutation(rows) < share * rows for share in shares])
        for task, shares in rights.items()
    }


def test_a_drop_is_relative_to_the_own_adapter():
    found = drops(answers({"a": [0.8, 0.5]}), answers({"a": [0.6, 0.5]}))
    assert found["a"] == pytest.approx([25.0, 0.0])


def test_a_merge_that_answers_as_the_own_adapters_loses_nothing_for_certain():
    """Paired: the own adapters' uncertainty is not the merge's."""
    own = answers({"a": [0.8], "b": [0.3]})
    summary = Resamples({"a": 400, "b": 400}).summary(own, own)
    assert (summary.mean, summary.low, summary.high, summary.worst) == (0, 0, 0, 0)


def test_worst_is_the_worst_task_of_each_seed():
    own = answers({"a": [1.0, 1.0], "b": [1.0, 1.0]})
    merged = answers({"a": [0.9, 0.8], "b": [0.7, 1.0]})
    summary = Resamples({"a": 400, "b": 400}).summary(own, merged)
    assert summary.worst == pytest.approx((30 + 20) / 2)
    assert summary.mean == pytest.approx((10 + 20 + 30 + 0) / 4)
    assert summary.per_task == pytest.approx({"a": 15, "b": 15})


def test_the_interval_holds_the_spread_of_tasks_and_of_rows():
    """Own answers all right, so a drop is a share of wrong rows, whose variance is known without a bootstrap."""
    wrong = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    own = answers({task: [1.0] for task in wrong})
    merged = answers({task: [1 - share] for task, share in wrong.items()})
    means = Resamples(dict.fromkeys(wrong, 400), draws=20_000).means(own, merged)
    of_rows = np.mean([share * (1 - share) / 400 for share in wrong.values()])
    expected = 100 * np.sqrt((np.var(list(wrong.values())) + of_rows) / 4)
    # 20,000 draws know a standard deviation to about 0.5 %; 3 % is six times that.
    assert means.std() == pytest.approx(expected, rel=0.03)
    assert means.mean() == pytest.approx(25, abs=0.3)


def test_an_adapter_without_a_right_answer_is_named():
    with pytest.raises(ValueError, match=r"'b'.*no test row"):
        drops(answers({"a": [0.5], "b": [0.0]}), answers({"a": [0.5], "b": [0.1]}))
