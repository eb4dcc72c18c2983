"""Commands of the pipeline: services, adapters in, candidates, sign-off, devices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from flows.command_line.output import Output, command

if TYPE_CHECKING:
    from infra.settings import Settings

_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)
_KEPT_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@command("up")
def up(output: Output) -> dict[str, Any]:
    """Start the local services: object store, MLflow, Prefect, and the runner of the flows.

    What runs already stays as it is; what died is started again. All state is below HYDRAOPT_HOME
    (default .hydraopt).

    Example: hydraopt up
    """
    from infra import local_services
    from infra.settings import Settings

    home = Settings.load().home
    with output.progress() as progress:
        services = local_services.up(home, progress=progress)
    return _show_services(output, services)


@command("down")
def down(output: Output) -> dict[str, Any]:
    """Stop the local services. Everything they hold stays on disk.

    Example: hydraopt down
    """
    from infra import local_services
    from infra.settings import Settings

    services = local_services.down(Settings.load().home)
    return _show_services(output, services)


@command("status")
def status(output: Output) -> dict[str, Any]:
    """Show which services run, and for every bundle what is desired against what is live.

    Example: hydraopt status
    """


@command("finetune")
@click.argument("task_file", metavar="TASKFILE", type=_KEPT_FILE)
def finetune(output: Output, task_file: Path) -> dict[str, Any]:
    """Train an adapter for TASKFILE, measure it and register it as the serving one.

    Nothing is trained twice: the same data, settings and code give the version that is there.

    Example: hydraopt finetune tasks/mood.yaml
    """
    with _connected(output):
        from flows.finetune_task import finetune_task

        result = finetune_task(task_file.absolute())
    output.show(_adapter_line(result))
    return result


@command("ingest")
@click.argument("source")
@click.option("--task", required=True, help="Name of the task the adapter does.")
@click.option("--task-file", type=_KEPT_FILE, help="Its task file; needed the first time.")
def ingest(output: Output, source: str, task: str, task_file: Path | None) -> dict[str, Any]:
    """Bring the PEFT folder SOURCE (a folder or s3://bucket/prefix) into the registry.

    Without --task-file the task file and test rows of the task's serving version are used again.

    Example: hydraopt ingest adapters/mood --task mood --task-file tasks/mood.yaml
    """
    with _connected(output):
        from flows.ingest_adapter import ingest_adapter

        place = source if source.startswith("s3://") else str(Path(source).absolute())
        result = ingest_adapter(place, task, task_file.absolute() if task_file else None)
    output.show(_adapter_line(result))
    return result


@command("reconcile")
def reconcile(output: Output) -> dict[str, Any]:
    """Bring every bundle's candidate up to date with its adapters, now.

    The same as the schedule does every five minutes. When no adapter changed, nothing is merged.

    Example: hydraopt reconcile
    """
    with _connected(output):
        from flows.reconcile import reconcile as reconcile_flow

        return reconcile_flow()


@contextlib.contextmanager
def _connected(output: Output) -> Iterator[Settings]:
    """Servers that answer, and tasks that report to this command's progress."""
    from flows.connection import connect

    settings = connect(verbose=output.verbose)

    from tasks.verb import reporting

    with output.progress() as progress, reporting(progress):
        yield settings
