"""What merging costs in accuracy: 12 fine-tuned classification adapters, every method at equal bytes.

    python tests/benchmarks/bench_quality.py --data DATA --work WORK
    python tests/benchmarks/bench_quality.py --data DATA --work WORK --seeds 1 --test-rows 100    # a first look

DATA holds ``<folder>/{train,validation,test}.jsonl.gz`` with rows ``{"text": ..., "label": ...}`` for the folders that
:mod:`quality_tasks` names. They are public data sets: CLINC150 (``clinc/clinc_oos`` on the hub; domains as in its
repository's ``domains.json``), Banking77 (``PolyAI/banking77``) and SIB-200 (``Davlan/sib200``, English).

One adapter per task and seed is trained on ``sentence-transformers/all-MiniLM-L6-v2`` and kept below WORK, as is every
answer, so a run may be killed at any time and goes on where it was. The table says how much of its own adapter's
accuracy a task loses in the merge, in percent of that accuracy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_adapters import train_set
from quality_intervals import Resamples, drops
from quality_merges import MERGES, Merge, make, share_without_extras
from quality_scores import Scorer
from quality_tables import markdown, printed
from quality_tasks import AdapterSet, adapter_sets, write_rows, write_task_files
from rich.console import Console

from hydraopt import Adapter, Bundle, HydraoptError, read_adapter
from hydraopt.evaluation.evaluate import evaluate_adapter, evaluate_bundle
from hydraopt.evaluation.task_file import TaskFile

CHECKED_TASK = "bank77-transfers"  # the one with the fewest test rows


def main() -> None:
    """Train what is missing, merge, measure, and write the table."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    console = Console(width=160)
    work = arguments.work
    write_rows(arguments.data, work, arguments.train_rows)
    folders: dict[AdapterSet, dict[str, Path]] = {}
    tasks: dict[str, TaskFile] = {}
    for adapters in adapter_sets(arguments.seeds, arguments.own_init_seeds):
        tasks = write_task_files(
            work,
            adapters,
            arguments.examples,
            freeze_a=arguments.freeze_a,
            nuclear_decay=arguments.nuclear_decay,
        )
        folders[adapters] = train_set(tasks, adapters, work, console)
    if arguments.train_only:
        return
    wanted = [merge for merge in MERGES if not arguments.method or merge.method in arguments.method]
    bench = Bench(tasks, Scorer(tasks, arguments.test_rows, work / "answers"), console, arguments.test_rows)
    for adapters, paths in folders.items():
        bench.measure(adapters, paths, wanted)
    result = bench.result() | {"machine": _machine(), "settings": _settings(arguments)}
    (work / "quality.json").write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (work / "quality.md").write_text(markdown(result), encoding="utf-8")
    for table in printed(result):
        console.print(table)


class Bench:
    """Everything measured so far."""

    def __init__(
        self, tasks: Mapping[str, TaskFile], scorer: Scorer, console: Console, limit: int | None
    ) -> None:
        self._tasks = tasks
        self._scorer = scorer
        self._console = console
        self._limit = limit
        self._own: dict[AdapterSet, dict[str, np.ndarray]] = {}
        self._merged: dict[tuple[AdapterSet, Merge], dict[str, np.ndarray]] = {}
        self._sizes: dict[tuple[AdapterSet, Merge], dict[str, float]] = {}
        self._refused: dict[Merge, str] = {}
        self._checked = False
        self._resamples = Resamples({name: len(truth) for name, truth in scorer.truth.items()})

    def measure(self, adapters: AdapterSet, paths: Mapping[str, Path], merges: Sequence[Merge]) -> None:
        """Score the adapters of a set, then every merge of them."""
        opened = {name: read_adapter(path) for name, path in paths.items()}
        self._own[adapters] = {name: self._scorer.adapter(name, opened[name]) for name in opened}
        if not self._checked:
            self._check_adapter(adapters, paths[CHECKED_TASK])
        for merge in merges:
            if merge in self._refused or not (adapters.common_init or merge.own_inits):
                continue
            bundle = self._make(merge, opened)
            if bundle is None:
                continue
            answers = {name: self._scorer.bundle(name, bundle) for name in opened}
            if not self._checked:
                self._check_bundle(bundle, answers[CHECKED_TASK])
                self._checked = True
            self._keep(adapters, merge, opened, bundle, answers)

    def _make(self, merge: Merge, opened: Mapping[str, Adapter]) -> Bundle | None:
        try:
            return make(merge, opened)
        except HydraoptError as reason:
            self._refused[merge] = str(reason)
            self._console.print(
                f"{merge.name}, {merge.bits} bits, level {merge.level}: not available: {reason}"
            )
            return None

    def _keep(
        self,
        adapters: AdapterSet,
        merge: Merge,
        opened: Mapping[str, Adapter],
        bundle: Bundle,
        answers: dict[str, np.ndarray],
    ) -> None:
        self._merged[adapters, merge] = answers
        self._sizes[adapters, merge] = {
            "storage": bundle.storage_ratio,
            "storage_without_classifiers": share_without_extras(bundle, opened),
            "relative_squared_error": bundle.relative_error**2,
        }
        drop = np.mean(list(drops(self._right([self._own[adapters]]), self._right([answers])).values()))
        self._console.print(
            f"{adapters.name}: {merge.name}, {merge.bits} bits, level {merge.level} of {merge.counted}: "
            f"storage {bundle.storage_ratio:.4f}, mean drop {drop:.2f} %"
        )

    def result(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        return {
            "own_accuracy": {
                adapters.name: {
                    name: float((answers == self._scorer.truth[name]).mean()) for name, answers in own.items()
                }
                for adapters, own in self._own.items()
            },
            "test_rows": {name: len(truth) for name, truth in self._scorer.truth.items()},
            "one_init": self._rows([s for s in self._own if s.common_init]),
            "own_inits": self._rows([s for s in self._own if not s.common_init]),
            "not_available": [{**_description(merge), "reason": why} for merge, why in self._refused.items()],
        }

    def _rows(self, sets: Sequence[AdapterSet]) -> list[dict[str, Any]]:
        """A row for every merge made of any of the sets, over those it was made of."""
        made_of = {merge: [one for one in sets if (one, merge) in self._merged] for merge in MERGES}
        return [self._row(merge, made_of[merge], made_of) for merge in MERGES if made_of[merge]]

    def _row(
        self, merge: Merge, sets: Sequence[AdapterSet], made_of: Mapping[Merge, Sequence[AdapterSet]]
    ) -> dict[str, Any]:
        own = self._right([self._own[one] for one in sets])
        merged = self._right([self._merged[one, merge] for one in sets])
        sizes = [self._sizes[one, merge] for one in sets]
        means = {key: float(np.mean([size[key] for size in sizes])) for key in sizes[0]}
        summary = self._resamples.summary(own, merged)
        row = {**_description(merge), **means, **asdict(summary), "sets": len(sets)}
        ours = _hydraopt_at(merge)
        if ours is not None and set(sets) <= set(made_of[ours]):
            theirs = self._right([self._merged[one, ours] for one in sets])
            more = self._resamples.means(own, merged) - self._resamples.means(own, theirs)
            low, high = np.percentile(more, [2.5, 97.5])
            difference = summary.mean - self._resamples.summary(own, theirs).mean
            row["more_than_hydraopt"] = {"mean": difference, "low": float(low), "high": float(high)}
        return row

    def _right(self, answers: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Per task, booleans (sets, rows)."""
        truth = self._scorer.truth
        return {name: np.stack([given[name] == truth[name] for given in answers]) for name in truth}

    def _check_adapter(self, adapters: AdapterSet, path: Path) -> None:
        value = evaluate_adapter(self._tasks[CHECKED_TASK], path, device="cpu", limit=self._limit).value
        self._compare(value, self._own[adapters][CHECKED_TASK], str(path))

    def _check_bundle(self, bundle: Bundle, answers: np.ndarray) -> None:
        value = evaluate_bundle(self._tasks[CHECKED_TASK], bundle, device="cpu", limit=self._limit).value
        self._compare(value, answers, repr(bundle))

    def _compare(self, value: float, answers: np.ndarray, what: str) -> None:
        """This script's scoring against the library's, which loads and attaches in quite another way."""
        found = float((answers == self._scorer.truth[CHECKED_TASK]).mean())
        if abs(found - value) > 1e-9:
            raise RuntimeError(
                f"{what}: accuracy {found} on {CHECKED_TASK}, but hydraopt.evaluation says {value}"
            )


def _hydraopt_at(merge: Merge) -> Merge | None:
    """The merge by hydraopt to compare with: same level, and free bits for whatever is not stored in 16."""
    bits = 16 if merge.bits == 16 else "auto"
    wanted = ("hydraopt", bits, merge.level, merge.counted)
    same = [other for other in MERGES if (other.method, other.bits, other.level, other.counted) == wanted]
    return same[0] if same and same[0] != merge else None


def _description(merge: Merge) -> dict[str, Any]:
    return {"method": merge.name, "bits": merge.bits, "level": merge.level, "counted": merge.counted}


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(arguments, name)
        for name in ("examples", "freeze_a", "nuclear_decay", "train_rows", "test_rows")
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="Folder of the data sets.")
    parser.add_argument(
        "--work", type=Path, required=True, help="Folder for adapters, answers and the result."
    )
    parser.add_argument("--seeds", type=int, default=3, help="Data orders, all tasks from one A.")
    parser.add_argument(
        "--own-init-seeds", type=int, default=1, help="Data orders, every task from its own A."
    )
    parser.add_argument(
        "--examples", type=int, default=3200, help="Training rows a task sees, repeats counted."
    )
    parser.add_argument(
        "--freeze-a",
        action="store_true",
        help="Train B alone: all tasks of a set keep one A. Give it its own --work.",
    )
    parser.add_argument(
        "--nuclear-decay",
        type=float,
        default=0.0,
        help="`training.nuclear_decay` of the task files; needs --freeze-a. RESULTS.md has 3, with --examples 6400.",
    )
    parser.add_argument("--train-rows", type=int, help="Training rows per task at most; default all.")
    parser.add_argument("--test-rows", type=int, help="Test rows per task at most; default all.")
    parser.add_argument("--method", action="append", help="Only this method; may be given several times.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--train-only", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
