"""Commands of the library: they work on files and need no server."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from flows.command_line.output import Output, command
from flows.command_line.process_memory import collect_seldom
from hydraopt.bundle.profiles import PROFILES
from hydraopt.errors import AdapterMismatchError, TaskFileError

if TYPE_CHECKING:
    from hydraopt.adapters import Adapter
    from hydraopt.adapters.similarity import Similarity
    from hydraopt.bundle import Bundle
    from hydraopt.evaluation.task_file import Split
    from hydraopt.merging.second_moments import SecondMoments
    from hydraopt.progress import Progress

_DTYPES = ["bfloat16", "float16", "float32"]
_METHODS = ["hydraopt", "paper", "separate", "two-sided", "ta", "ties", "dare", "dare-ties", "gradient"]
_BITS = ["auto", "16", "8", "6", "4", "3", "2"]
_DEVICES = ["auto", "cpu", "cuda"]


@command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the bundle to.")
@click.option(
    "--budget",
    type=float,
    help="Share of the input bytes, in (0, 1]; 0.25 if nothing else is given. 1 keeps every direction, whatever that "
    "takes: for tiny adapters more than they do.",
)
@click.option(
    "--max-error",
    type=float,
    help="Instead of a budget: a bound on |dW - merged| / |dW|, root mean square over the tasks by their --weights; "
    "with --calibrate, of what the modules give out for the rows' inputs.",
)
@click.option(
    "--keep-shared",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="Keep this bundle's shared part and the files of unchanged tasks, byte for byte.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="TASKFILE",
    help="Weigh errors by what the base model feeds each module on this task's training rows; may be repeated.",
)
@click.option("--calibrate-rows", type=int, help="Rows of each --calibrate task; default 64.")
@click.option("--method", type=click.Choice(_METHODS), show_default="hydraopt")
@click.option("--heads", type=int, help="For paper, gradient: number of dense heads; default one per task.")
@click.option(
    "--rank",
    type=int,
    help="For paper, gradient: rows of A'; for separate: directions per task; for ta, ties, dare, dare-ties: of the "
    "one update, by default the adapters' largest.",
)
@click.option(
    "--on", type=click.Choice(["dw", "factors"]), help="For ta, ties, dare, dare-ties; dw by default."
)
@click.option(
    "--density", type=float, help="Share of entries that stay; ties 0.2, dare and dare-ties 0.5 by default."
)
@click.option(
    "--scale", type=float, help="For ta, ties, dare, dare-ties: multiplies the one update; default 1."
)
@click.option("--steps", type=int, help="For gradient: steps of Adam; default 1000.")
@click.option(
    "--bits",
    type=click.Choice(_BITS),
    show_default="auto",
    help="Bits per stored number; auto trades them against ranks, vector by vector.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="TASK=WEIGHT",
    help="Relative weight of a task's error, 1 unless given; may be repeated.",
)
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    show_default="bfloat16",
    help="Floats of 16 or 32 bits.",
)
@click.option("--device", type=click.Choice(_DEVICES), default="auto", show_default=True)
@click.option("--seed", type=int, show_default="0")
def merge(
    output: Output,
    *,
    adapters: tuple[str, ...],
    out: Path,
    bits: str | None,
    weights: tuple[str, ...],
    calibrate: tuple[Path, ...],
    calibrate_rows: int | None,
    **settings: Any,
) -> dict[str, Any]:
    """Merge task adapters (PEFT folders) of one base model into one small bundle.

    A task is named like its folder, or NAME=FOLDER says otherwise. With --keep-shared, devices that hold the
    former bundle fetch the files of changed tasks alone.

    Example: hydraopt merge adapters/mood topic=runs/17 --budget 0.25 --out bundle
    """
    import hydraopt
    from hydraopt.bundle.contents import check_replaceable

    check_replaceable(out)
    _check_calibration(calibrate, calibrate_rows, settings["method"])
    collect_seldom()
    start = time.perf_counter()
    with output.progress() as progress, ExitStack() as moments:
        named = _named(adapters)
        if calibrate:
            settings["metrics"] = moments.enter_context(
                _second_moments(calibrate, named, calibrate_rows, settings["device"], progress)
            )
        bundle = hydraopt.merge(
            named,
            bits=int(bits) if bits and bits != "auto" else bits,
            weights=_weights(weights) if weights else None,
            progress=progress,
            **settings,
        )
        bundle.save(out)
    seconds = time.perf_counter() - start
    entries = bundle.manifest.tasks
    table = Table("task", "relative error", "bytes")
    for task, entry in sorted(entries.items()):
        table.add_row(task, f"{entry.relative_error:.4f}", f"{entry.file.bytes:,}")
    output.show(table)
    output.show(
        f"{out}: bundle {bundle.id[:12]}, {len(entries)} tasks, {100 * bundle.storage_ratio:.1f} % of the adapters' "
        f"bytes, relative error {bundle.relative_error:.4f}, {seconds:.1f} s"
    )
    for warning in bundle.warnings:
        output.show(f"warning: {warning}")
    return {
        "bundle_id": bundle.id,
        "out": out,
        "storage_ratio": bundle.storage_ratio,
        "relative_error": bundle.relative_error,
        "warnings": list(bundle.warnings),
        "tasks": {
            task: {"relative_error": entry.relative_error, "bytes": entry.file.bytes}
            for task, entry in sorted(entries.items())
        },
        "seconds": seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


@command("frontier")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--plot", type=click.Path(path_type=Path), help="Also draw it: a .png or .html file.")
@click.option(
    "--dtype", type=click.Choice(_DTYPES), default="bfloat16", show_default=True, help="Stored numbers."
)
@click.option("--device", type=click.Choice(_DEVICES), default="auto", show_default=True)
def frontier(
    output: Output, adapters: tuple[str, ...], plot: Path | None, dtype: str, device: str
) -> dict[str, Any]:
    """Error over storage for every method, without writing a bundle.

    Example: hydraopt frontier adapters/* --plot frontier.html
    """
    from hydraopt.merging.frontier import frontier as trace

    _check_plot(plot)
    collect_seldom()
    start = time.perf_counter()
    with output.progress() as progress:
        points = trace(_named(adapters), dtype=dtype, device=device, progress=progress)
    seconds = time.perf_counter() - start
    table = Table("method", "bits", "budget", "storage", "relative error")
    for point in points:
        table.add_row(
            point.method,
            str(point.bits),
            f"{point.budget:g}",
            f"{100 * point.storage_ratio:.1f} %",
            f"{point.relative_error:.4f}",
        )
    output.show(table)
    if plot is not None:
        from hydraopt.report.charts import plot_frontier

        output.show(f"drawn: {plot_frontier(points, plot)}")
    return {
        "points": [vars(point) for point in points],
        "plot": plot,
        "seconds": seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
    }


@command("inspect")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="Draw the similarity of tasks: a .png or .html file."
)
def inspect(output: Output, paths: tuple[str, ...], plot: Path | None) -> dict[str, Any]:
    """What an adapter or a bundle holds: base, kind, ranks, bytes, similarity between tasks.

    With several adapters: how much they have in common, and whether sharing will pay.

    Example: hydraopt inspect bundle --plot similarity.html
    """
    import hydraopt
    from hydraopt.bundle.layout import MANIFEST_FILE

    _check_plot(plot)
    if len(paths) > 1:
        return _inspect_set(output, _named(paths), plot)
    path = Path(paths[0])
    if (path / MANIFEST_FILE).is_file():
        return _inspect_bundle(output, hydraopt.Bundle.load(path), plot)
    if plot is not None:
        raise AdapterMismatchError(f"{path}: one adapter has nothing to be compared with; give several")
    return _inspect_adapter(output, hydraopt.read_adapter(path))


@command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--key",
    "keys",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A public key to trust, NAME.pem; without it, those below HYDRAOPT_HOME. May be repeated.",
)
def verify(output: Output, bundle: Path, keys: tuple[Path, ...]) -> dict[str, Any]:
    """Check a bundle: digests, shapes, finite values; and, if they lie beside it, who vouches for it.

    A pulled bundle is a link to .BUNDLE.bundles/ID and has ID.release.json beside it there: approvals, signed
    provenance, bill of materials. They are checked without any server.

    Example: hydraopt verify bundle --key ana.pem
    """
    import hydraopt

    manifest = hydraopt.verify(bundle)
    output.show(f"{bundle}: bundle {manifest.id} is whole, {len(manifest.tasks)} tasks")
    result = {"bundle_id": manifest.id, "tasks": list(manifest.task_names), "bytes": manifest.bytes_on_disk}
    documents = bundle.resolve().with_name(f"{bundle.resolve().name}.release.json")
    if not documents.is_file() and not keys:
        return {**result, "signature": None}
    from flows.command_line.signature import check_signature

    return {**result, "signature": check_signature(output, manifest, documents, keys)}


@command("export")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for one PEFT folder per task."
)
@click.option("--task", help="Only this task.")
@click.option("--profile", type=click.Choice(PROFILES), default="peft", show_default=True)
def export(output: Output, bundle: Path, out: Path, task: str | None, profile: str) -> dict[str, Any]:
    """Write a bundle's tasks as ordinary PEFT folders: as the kinds they were (peft), or as the LoRA a server reads.

    Example: hydraopt export bundle --out exported --profile portable
    """
    import hydraopt

    folders = hydraopt.Bundle.load(bundle).export(out, task=task, profile=profile)
    for name, folder in folders.items():
        output.show(f"{name}: {folder}")
    return {"folders": folders, "profile": profile}


@command("evaluate")
@click.argument("taskfile", type=click.Path(path_type=Path))
@click.option("--adapter", type=click.Path(path_type=Path), help="A PEFT folder.")
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle that has the task.")
@click.option("--device", type=click.Choice(_DEVICES), default="auto", show_default=True)
@click.option("--limit", type=int, help="Only so many rows, spread evenly over all.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
    help="Which of the task's rows.",
)
def evaluate(
    output: Output,
    *,
    taskfile: Path,
    adapter: Path | None,
    bundle: Path | None,
    device: str,
    limit: int | None,
    split: Split,
) -> dict[str, Any]:
    """Measure an adapter or a bundle on a task's test rows, or on those to tune on (--split validation).

    Example: hydraopt evaluate mood.yaml --bundle bundle
    """
    if (adapter is None) == (bundle is None):
        raise click.UsageError("give either --adapter FOLDER or --bundle BUNDLE")
    if limit is not None and limit < 1:
        raise TaskFileError(f"--limit is {limit}; at least one row must be measured")
    from hydraopt.evaluation.evaluate import evaluate_adapter, evaluate_bundle
    from hydraopt.evaluation.task_file import TaskFile

    task = TaskFile.load(taskfile)
    rows = task.read_rows(split)
    with output.progress() as progress:
        if adapter is not None:
            result = evaluate_adapter(task, adapter, rows=rows, device=device, limit=limit, progress=progress)
        else:
            result = evaluate_bundle(task, bundle, rows=rows, device=device, limit=limit, progress=progress)
    output.show(
        f"{result.task}: {result.metric} {result.value:.4f} "
        f"(95 % interval {result.low:.4f} to {result.high:.4f}, {result.samples} samples)"
    )
    return result.model_dump(mode="json")


def _named(arguments: Iterable[str]) -> dict[str, Path]:
    """Adapter folders by task name."""
    adapters: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or Path(argument).is_dir():
            path = Path(argument)
            name = Path(os.path.abspath(argument)).name  # noqa: PTH100 - a link's own name, not its target's
        else:
            if not folder:
                raise AdapterMismatchError(f"{argument!r} names no folder: write NAME=FOLDER")
            path = Path(folder)
        if name in adapters:
            raise AdapterMismatchError(
                f"two adapters are called {name!r}: {adapters[name]} and {path}; name them with NAME=FOLDER"
            )
        adapters[name] = path
    return adapters


def _check_calibration(calibrate: Sequence[Path], rows: int | None, method: str | None) -> None:
    """Refuse what cannot be meant before the base model is loaded."""
    from hydraopt.recipe import METHODS_OF

    able = METHODS_OF["calibration"]
    if calibrate and method is not None and method not in able:
        raise click.UsageError(f"--calibrate is not for --method {method}, but for {', '.join(able)}")
    if rows is not None and not calibrate:
        raise click.UsageError(f"--calibrate-rows {rows} without --calibrate: name the task files, too")
    places = Counter(path.resolve() for path in calibrate)
    if twice := next((path for path in calibrate if places[path.resolve()] > 1), None):
        raise click.UsageError(f"--calibrate {twice} is given twice; its rows would count twice")


def _second_moments(
    calibrate: Iterable[Path], named: dict[str, Path], rows: int | None, device: str, progress: Progress
) -> AbstractContextManager[SecondMoments]:
    """What the base model feeds the adapted modules on the training rows of these tasks."""
    import hydraopt
    from hydraopt.evaluation.calibration import ROWS, second_moments
    from hydraopt.evaluation.task_file import TaskFile

    rows = ROWS if rows is None else rows
    tasks = [TaskFile.load(path) for path in calibrate]
    adapters = {task: hydraopt.read_adapter(folder) for task, folder in named.items()}
    return second_moments(tasks, adapters, rows=rows, device=device, progress=progress)


def _check_plot(plot: Path | None) -> None:
    """Refuse a picture that cannot be drawn before the work it would show."""
    if plot is not None:
        from hydraopt.report.charts import check_plot

        check_plot(plot)


def _weights(arguments: Iterable[str]) -> dict[str, float]:
    """Relative weights by task name."""
    weights: dict[str, float] = {}
    for argument in arguments:
        task, equals, number = argument.partition("=")
        if task in weights:
            raise AdapterMismatchError(f"--weights names the task {task!r} twice: {argument!r}")
        try:
            weights[task] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise AdapterMismatchError(f"--weights {argument!r}: write TASK=WEIGHT, such as mood=2.5")
    return weights


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _inspect_adapter(output: Output, adapter: Adapter) -> dict[str, Any]:
    adapter.check_finite()
    ranks = sorted({module.rank for module in adapter.modules.values()})
    result = {
        "what": "adapter",
        "kind": adapter.kind,
        "settings": adapter.settings,
        "base_model": adapter.base_model,
        "revision": adapter.revision,
        "task_type": adapter.task_type,
        "digest": adapter.digest,
        "ranks": ranks,
        "extras": list(adapter.extras),
        "bytes": adapter.file.path.stat().st_size,
        "reference_bytes": adapter.reference_bytes,
        "modules": {
            name: {
                "shape": [module.d_out, module.d_in],
                "layer": module.layer,
                "rank": module.rank,
                "scaling": module.scaling,
            }
            for name, module in sorted(adapter.modules.items())
        },
    }
    output.show(_facts(result, skip={"modules", "what"}))
    table = Table("module", "layer", "d_out x d_in", "rank", "scaling")
    for name, module in sorted(adapter.modules.items()):
        size = f"{module.d_out} x {module.d_in}"
        table.add_row(name, module.layer, size, str(module.rank), f"{module.scaling:g}")
    output.show(table)
    return result


def _inspect_set(output: Output, folders: dict[str, Path], plot: Path | None) -> dict[str, Any]:
    from hydraopt.report.sharing import sharing_advice

    with output.progress() as progress:
        advice = sharing_advice(folders, progress=progress)
    _show_similarity(output, advice.similarity, plot)
    output.show(advice.words)
    return {
        "what": "set",
        "similarity": _similarity_json(advice.similarity),
        "shared_error": advice.shared_error,
        "separate_error": advice.separate_error,
        "budget": advice.budget,
        "pays": advice.pays,
        "words": advice.words,
        "plot": plot,
    }


def _inspect_bundle(output: Output, bundle: Bundle, plot: Path | None) -> dict[str, Any]:
    manifest = bundle.manifest
    found = _bundle_similarity(bundle)
    families = Counter(module.family for module in manifest.modules)
    result = {
        "what": "bundle",
        "bundle_id": bundle.id,
        "base_model": manifest.base_model.name,
        "revision": manifest.base_model.revision,
        "recipe": manifest.recipe.model_dump(mode="json", exclude_none=True),
        "storage_ratio": bundle.storage_ratio,
        "relative_error": bundle.relative_error,
        "bytes": manifest.bytes_on_disk,
        "shared_bytes": manifest.shared.bytes,
        "families": dict(sorted(families.items())),
        "tasks": {
            task: {
                "adapter": entry.adapter,
                "kind": entry.kind,
                "bytes": entry.file.bytes,
                "relative_error": entry.relative_error,
                "extras": sorted(bundle.extras(task)),
            }
            for task, entry in sorted(manifest.tasks.items())
        },
        "modules": [module.model_dump(mode="json") for module in manifest.modules],
        "similarity": _similarity_json(found),
    }
    output.show(_facts(result, skip={"modules", "what", "tasks", "similarity"}))
    table = Table("task", "bytes", "relative error")
    for task, entry in sorted(manifest.tasks.items()):
        table.add_row(task, f"{entry.file.bytes:,}", f"{entry.relative_error:.4f}")
    output.show(table)
    _show_similarity(output, found, plot)
    return result


def _similarity_json(found: Similarity) -> dict[str, Any]:
    return {"tasks": list(found.tasks), "a": found.a.tolist(), "b": found.b.tolist()}


def _show_similarity(output: Output, found: Similarity, plot: Path | None) -> None:
    """Both overlaps as tables shaded by value, and as a picture if asked for."""
    for side, matrix in (("A", found.a), ("B", found.b)):
        overlaps = Table(f"overlap of {side}", *found.tasks)
        for task, row in zip(found.tasks, matrix.tolist(), strict=True):
            overlaps.add_row(task, *(Text(f"{value:.2f}", f"white on {_shade(value)}") for value in row))
        output.show(overlaps)
    if plot is not None:
        from hydraopt.report.charts import plot_similarity

        output.show(f"drawn: {plot_similarity(found, plot)}")


def _shade(value: float) -> str:
    """A background between the terminal's black and teal."""
    level = min(max(value, 0.0), 1.0)
    return f"#{int(11 * level):02x}{int(114 * level):02x}{int(133 * level):02x}"


def _bundle_similarity(bundle: Bundle) -> Similarity:
    from hydraopt.adapters.similarity import similarity
    from hydraopt.bundle.chains import pair

    factors = {task: bundle.factors(task) for task in bundle.task_names}
    return similarity(
        bundle.task_names,
        [module.name for module in bundle.manifest.modules],
        lambda task, module: pair(factors[task][module]) if module in factors[task] else None,
    )


def _facts(result: dict[str, Any], skip: set[str]) -> Table:
    table = Table(show_header=False)
    for key, value in result.items():
        if key not in skip:
            table.add_row(key.replace("_", " "), str(value))
    return table


__all__ = ["evaluate", "export", "frontier", "inspect", "merge", "verify"]
