"""Relative drops of accuracy, and their 95 % intervals by a bootstrap over tasks and test rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Right = Mapping[str, np.ndarray]
"""Per task, booleans (seeds, rows): which rows were answered rightly."""


def drops(own: Right, merged: Right) -> dict[str, np.ndarray]:
    """Relative drop of accuracy in percent, ``100 (1 - merged / own)``: per task (seeds,).

    Raises:
        ValueError: If an own adapter answers nothing rightly: no drop is relative to that.
    """
    for task, right in own.items():
        if not right.any(axis=1).all():
            raise ValueError(f"task {task!r}: its own adapter answers no test row rightly; train it longer")
    return {task: 100 * (1 - merged[task].mean(axis=1) / own[task].mean(axis=1)) for task in own}


@dataclass(frozen=True)
class Summary:
    """Drops in percent: the mean over tasks and seeds with its interval, and the worst task's, mean over seeds."""

    mean: float
    low: float
    high: float
    worst: float
    per_task: dict[str, float]


class Resamples:
    """Draws of tasks and of their rows, the same for every merge, so that merges can be compared with one another.

    A draw takes as many tasks as there are, with replacement, and for each its rows with replacement. The seeds
    of a task share its rows and are kept together.

    Args:
        rows: Rows by task.
        draws: Number of draws.
    """

    def __init__(self, rows: Mapping[str, int], draws: int = 2000) -> None:
        random = np.random.default_rng(0)
        self._tasks = sorted(rows)
        self._drawn = random.integers(len(rows), size=(draws, len(rows)))  # task of every place of a draw
        self._counts = {
            task: random.multinomial(
                rows[task], np.full(rows[task], 1 / rows[task]), size=int((self._drawn == index).sum())
            ).astype(np.float32)
            for index, task in enumerate(self._tasks)
        }

    def means(self, own: Right, merged: Right) -> np.ndarray:
        """The mean drop in percent of every draw."""
        values = np.empty(self._drawn.shape)
        for index, task in enumerate(self._tasks):
            counts = self._counts[task]  # (times the task was drawn, rows)
            ratio = (counts @ merged[task].T.astype(np.float32)) / (counts @ own[task].T.astype(np.float32))
            values[self._drawn == index] = 100 * (1 - ratio.mean(axis=1))
        return values.mean(axis=1)

    def summary(self, own: Right, merged: Right) -> Summary:
        """Drops of one merge against the tasks' own adapters."""
        by_task = drops(own, merged)
        low, high = np.percentile(self.means(own, merged), [2.5, 97.5])
        stacked = np.stack([by_task[task] for task in sorted(by_task)])  # (tasks, seeds)
        return Summary(
            mean=float(stacked.mean()),
            low=float(low),
            high=float(high),
            worst=float(stacked.max(axis=0).mean()),
            per_task={task: float(values.mean()) for task, values in sorted(by_task.items())},
        )
