"""The one verb: merge a set of adapters into a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from pydantic import ValidationError

from hydraopt.adapters import Adapter, read_adapter
from hydraopt.adapters.together import check_kinds
from hydraopt.bundle.contents import Bundle
from hydraopt.devices import find_device
from hydraopt.errors import AdapterMismatchError, BudgetError
from hydraopt.merging.former import kept_settings
from hydraopt.merging.keep_shared import KeepingRun
from hydraopt.merging.run import MergeRun
from hydraopt.merging.second_moments import SecondMoments
from hydraopt.names import check_task_name
from hydraopt.progress import Progress
from hydraopt.recipe import ONE_FOR_ALL, Recipe

_MOST_WEIGHT = 1e12  # sums of weights are to keep digits of every one


def merge(
    adapters: Mapping[str, Adapter | Path | str],
    *,
    budget: float | None = None,
    max_error: float | None = None,
    method: str | None = None,
    heads: int | None = None,
    rank: int | None = None,
    on: str | None = None,
    density: float | None = None,
    scale: float | None = None,
    steps: int | None = None,
    bits: int | str | None = None,
    weights: Mapping[str, float] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    seed: int | None = None,
    keep_shared: Bundle | Path | str | None = None,
    metrics: SecondMoments | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Merge the adapters of one base model into a bundle.

    Minimises ``sum_k w_k |dW_k - merged_k|^2`` over all modules, with ``w_k = 1 / |dW_k|^2`` (a task with large
    updates must not drown the others), in closed form. Memory stays at about one module of all adapters plus
    the bundle. The result does not depend on the order of the tasks or on how an adapter was factorised.

    Args:
        adapters: Opened adapters or their folders, by task name.
        budget: Bundle bytes as a share of the adapters' bytes counted at the stored dtype's size (two bytes a number
            for the 16-bit dtypes), in (0, 1]. 1 keeps every direction of every adapter. Default 0.25 unless
            ``max_error`` or ``rank`` is given, or the method takes no budget.
        max_error: Instead of a budget: a bound on the root mean square over the tasks, by their weights, of the
            relative Frobenius error |dW - merged| / |dW|. A single task may be above it.
        method: ``hydraopt`` (adaptive; the default), ``paper`` (one A' and dense heads at one rank), ``separate``,
            ``two-sided``; ``gradient`` (the paper's form fitted by Adam, by ``rank`` or ``budget``); one update for
            all tasks, which takes neither budget nor error: ``ta``, ``ties``, ``dare``, ``dare-ties``, of the mean over
            the tasks (with ``weights``, the weighted one; a module that a task lacks counts as zero there).
        heads: For ``paper`` and ``gradient``: number M of dense heads; which tasks share one is chosen per module.
            Default one per task.
        rank: For ``paper`` and ``gradient``: rows of A'; for ``separate``: directions per task; instead of a budget.
            For methods of one update: its rank, by default the largest of any adapter.
        on: For methods of one update: ``dw`` (default) merges entries of ``B A``, ``factors`` those of A and B apart.
        density: Share of entries that stay. ``ties``: the largest, default 0.2 as in its paper; ``dare`` and
            ``dare-ties``: at random, default 0.5 (its paper searches for it).
        scale: For methods of one update: multiplies it, default 1; the lambda of task arithmetic and TIES.
        steps: For ``gradient``: steps of Adam, default 1000.
        bits: Bits per stored number: 16, 8, 6, 4, 3 or 2; ``auto`` (the default) trades them against ranks, vector
            by vector, for the methods a budget adapts, and is 16 for the others.
        weights: Relative weight of a task's error; 1 for those not named.
        dtype: Float dtype of what is stored in 16 bits: ``bfloat16`` (the default) or ``float16``; ``float32`` stores
            everything so.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of random choices: DARE's, the random starts of groups, and of fits.
        keep_shared: A former bundle whose shared part, and the files of whose unchanged tasks, are kept byte for byte,
            so that a device fetches the files of changed tasks alone; see :mod:`hydraopt.merging.keep_shared`. All
            settings but ``budget`` and ``weights`` are the former ones. ``warnings`` of the result says where a changed
            task fits the former shared part badly.
        metrics: Second moments ``C`` of modules' inputs, from :mod:`hydraopt.evaluation.calibration`. Then
            ``|(dW - merged) C^(1/2)|`` is what is minimised, weights included. Reported errors stay plain. Families
            that share the output side are left aside: ``C`` belongs to the input side.
        executor: Where modules are worked on: None is a thread per core of this process; else anything with the
            interface of :class:`concurrent.futures.Executor` that can pickle closures and sees the adapters' folders,
            such as ``dask.distributed.Client(...).get_executor()``. The result is the same.
        progress: Called with (done, total, what).

    Raises:
        AdapterMismatchError: If the adapters belong to different base models or disagree about a module, or with the
            bundle that is kept.
        BundleError: If the bundle that is kept is damaged, or was made with other settings than are asked for.
        BudgetError: If the budget, error or rank cannot be met.
        DeviceError: If there is no such device.
        AdapterFormatError: If an adapter cannot be read exactly.
    """
    given: dict[str, object] = {
        "method": method,
        "budget": budget,
        "max_error": max_error,
        "heads": heads,
        "rank": rank,
        "on": on,
        "density": density,
        "scale": scale,
        "steps": steps,
        "bits": bits,
        "weights": dict(weights) if isinstance(weights, Mapping) else weights,
        "dtype": dtype,
        "seed": seed,
        "calibration": None if metrics is None else metrics.digest,
    }
    given = {name: value for name, value in given.items() if value is not None}
    opened, former = _opened(adapters, keep_shared)
    if former is not None:
        given = kept_settings(former, given, opened)
    elif not given.keys() & {"budget", "max_error", "rank"} and method not in ONE_FOR_ALL:
        given["budget"] = 0.25
    recipe = make_recipe(**given)
    check_weights(recipe, opened)
    where, report = find_device(device), progress or silent
    if former is not None:
        return KeepingRun(former, opened, recipe, device=where, progress=report, metrics=metrics).run()
    if recipe.heads is not None and recipe.heads > len(opened):
        raise BudgetError(f"heads={recipe.heads} is more than one for each of {len(opened)} tasks")
    if recipe.method in ONE_FOR_ALL and recipe.rank is None:
        recipe = recipe.model_copy(update={"rank": largest_input_rank(opened)})
    return MergeRun(opened, recipe, where, report, metrics, executor=executor).run()


def _opened(
    adapters: Mapping[str, Adapter | Path | str], keep_shared: Bundle | Path | str | None
) -> tuple[dict[str, Adapter], Bundle | None]:
    """The set in the order of its names, and the former bundle, whose bytes are read beside the adapters' headers."""
    if keep_shared is None or isinstance(keep_shared, Bundle):
        return open_set(adapters), keep_shared
    with ThreadPoolExecutor(1) as beside:
        former = beside.submit(Bundle.load, keep_shared)
        return open_set(adapters), former.result()


def open_set(adapters: Mapping[str, Adapter | Path | str]) -> dict[str, Adapter]:
    """Adapters in the order of their names, opened and checked to fit together.

    Raises:
        AdapterFormatError: If one cannot be read exactly.
        AdapterMismatchError: As for :func:`merge`.
    """
    if not isinstance(adapters, Mapping):
        raise AdapterMismatchError(f"adapters must be a mapping of names to folders, not {adapters!r}")
    names = [check_task_name(task) for task in adapters]
    opened = {task: open_adapter(adapters[task]) for task in sorted(names)}
    check_set(opened)
    return opened


def make_recipe(**settings: object) -> Recipe:
    """A :class:`Recipe` from loose settings.

    Raises:
        BudgetError: If a setting is out of range; the message names it and its value.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as reason:
        first = reason.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = f"{where}={first['input']!r}: " if where else ""
        raise BudgetError(value + first["msg"].removeprefix("Value error, ")) from reason


def check_weights(recipe: Recipe, adapters: Mapping[str, Adapter]) -> None:
    """Check that weights name tasks of the set, are of sizes that can be added up, and leave one that counts.

    Raises:
        AdapterMismatchError: If one names another.
        BudgetError: If one is too small or too large beside 1, or no task counts.
    """
    if strangers := sorted(set(recipe.weights) - set(adapters)):
        raise AdapterMismatchError(
            f"weights name the task {strangers[0]!r}, which is not in the set; it has {', '.join(adapters)}"
        )
    for task, weight in recipe.weights.items():
        if weight and not 1 / _MOST_WEIGHT <= weight <= _MOST_WEIGHT:
            raise BudgetError(
                f"the weight of task {task!r} is {weight}; it must be 0, or from {1 / _MOST_WEIGHT:g} to "
                f"{_MOST_WEIGHT:g}"
            )
    if not any(recipe.weights.get(task, 1.0) for task in adapters):
        raise BudgetError("the weights of all tasks are 0: there is nothing to merge")


def check_set(adapters: Mapping[str, Adapter]) -> None:
    """Check that the adapters can live in one bundle.

    Raises:
        AdapterMismatchError: If there is none, two base models or revisions, or a module of two sizes.
    """
    if not adapters:
        raise AdapterMismatchError("there is no adapter to merge")
    check_kinds(adapters)
    first_task, first = next(iter(adapters.items()))
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}
    for task, adapter in adapters.items():
        for what, found, expected in (
            ("base model", adapter.base_model, first.base_model),
            ("base model revision", adapter.revision, first.revision),
        ):
            if found != expected:
                raise AdapterMismatchError(
                    f"task {task!r} has {what} {found!r}, but task {first_task!r} has {expected!r}; "
                    "a bundle holds adapters of one base model: merge them separately"
                )
        for name, module in adapter.modules.items():
            size = (module.d_out, module.d_in)
            other, known = sizes.setdefault(name, (task, size))
            if size != known:
                raise AdapterMismatchError(
                    f"module {name!r}: task {task!r} updates a weight of {size}, but task {other!r} one of {known} "
                    "(d_out, d_in). Were both trained on the same base model?"
                )


def largest_input_rank(adapters: Mapping[str, Adapter]) -> int:
    """The largest rank of any adapter in any module."""
    return max(module.rank for adapter in adapters.values() for module in adapter.modules.values())


def open_adapter(adapter: Adapter | Path | str) -> Adapter:
    """The adapter itself, or the one in that folder."""
    return adapter if isinstance(adapter, Adapter) else read_adapter(adapter)


def silent(_done: int, _total: int, _what: str) -> None:
    """Report nothing."""
