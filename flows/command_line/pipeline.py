"""Commands of the pipeline: services, adapters in, reconcile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from flows.command_line.connected import connected, live_line, user_name
from flows.command_line.output import Output, command

if TYPE_CHECKING:
    from infra.local_services import ServiceStatus
    from infra.local_services.profiles import Profile

_KEPT_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@command("up")
@click.option(
    "--profile",
    type=click.Choice(["local", "production"]),
    help="Which servers; a home keeps the profile of its first `up`, which without this is local.",
)
def up(output: Output, profile: Profile | None) -> dict[str, Any]:
    """Start the services: object store, MLflow, Prefect, and the runner of the flows.

    The production profile adds PostgreSQL, passwords, a key per role and a worker per work pool. What runs
    already stays as it is; what died is started again. All state is below HYDRAOPT_HOME (default .hydraopt).

    Example: hydraopt up
    """
    from infra import local_services
    from infra.settings import Settings

    home = Settings.load().home
    with output.progress() as progress:
        services = local_services.up(home, profile=profile, progress=progress)
    return _show_services(output, services)


@command("down")
def down(output: Output) -> dict[str, Any]:
    """Stop the local services. Everything they hold stays on disk.

    Example: hydraopt down
    """
    from infra import local_services
    from infra.settings import home_folder

    with output.progress() as progress:
        services = local_services.down(home_folder(), progress=progress)
    return _show_services(output, services)


@command("status")
def status(output: Output) -> dict[str, Any]:
    """Show which services run, and for every bundle what is desired against what is live.

    Example: hydraopt status
    """
    from infra import local_services
    from infra.settings import Settings

    services = local_services.status(Settings.load().home)
    result = _show_services(output, services)
    if all(service.healthy for service in services.services if service.name in {"store", "mlflow"}):
        result["bundles"] = _bundles(output)
    return result


@command("finetune")
@click.argument("task_file", metavar="TASKFILE", type=_KEPT_FILE)
@click.option("--as", "who", help="Who trains it; without it, your user name on this machine.")
def finetune(output: Output, task_file: Path, who: str | None) -> dict[str, Any]:
    """Train an adapter for TASKFILE, measure it and register it as the serving one.

    Nothing is trained twice: the same data, settings and code give the version that is there.

    Example: hydraopt finetune tasks/mood.yaml
    """
    with connected(output):
        from flows.finetune_task import finetune_task

        result = finetune_task(task_file.absolute(), who or user_name())
    output.show(_adapter_line(result))
    return result


@command("ingest")
@click.argument("source")
@click.option("--task", required=True, help="Name of the task the adapter does.")
@click.option("--task-file", type=_KEPT_FILE, help="Its task file; needed the first time.")
@click.option("--as", "who", help="Who brings it in; without it, your user name on this machine.")
def ingest(
    output: Output, *, source: str, task: str, task_file: Path | None, who: str | None
) -> dict[str, Any]:
    """Bring the PEFT folder SOURCE (a folder or s3://bucket/prefix) into the registry.

    Without --task-file the task file and test rows of the task's serving version are used again.

    Example: hydraopt ingest adapters/mood --task mood --task-file tasks/mood.yaml
    """
    with connected(output):
        from flows.ingest_adapter import ingest_adapter

        place = source if source.startswith("s3://") else str(Path(source).absolute())
        file = task_file.absolute() if task_file else None
        result = ingest_adapter(place, task, file, who or user_name())
    output.show(_adapter_line(result))
    if result["value"] is None:
        output.note(
            "no test rows are known for this task: its bundle fails the gates until --task-file is given"
        )
    return result


@command("reconcile")
def reconcile(output: Output) -> dict[str, Any]:
    """Bring every bundle's candidate up to date with its adapters, now.

    The schedule does the same every five minutes. When no adapter changed, nothing is merged.

    Example: hydraopt reconcile
    """
    with connected(output):
        from flows.reconcile import reconcile as reconcile_flow
        from tasks.standing import WRONG_VIEW

        result = reconcile_flow()
    for name, bundle in result["bundles"].items():
        output.show(_bundle_line(name, bundle))
    for one in result["released"]:
        output.show(live_line(one))
    for name, showed in result["corrected_in_mlflow"].items():
        output.show(
            f"{name}: MLflow showed {showed[:12]} as live ({WRONG_VIEW}); it shows what is live again"
        )
    if not result["bundles"]:
        output.show("no adapter is registered yet: see `hydraopt finetune` and `hydraopt ingest`")
    return result


def _show_services(output: Output, services: ServiceStatus) -> dict[str, Any]:
    """The services as a table, and as the command's object."""
    table = Table("service", "state", "address", "process")
    for one in services.services:
        state = "healthy" if one.healthy else one.problem or "not healthy"
        table.add_row(one.name, state, one.address or "-", str(one.pid or "-"))
    output.show(table)
    return {
        "home": services.home,
        "profile": services.profile,
        "healthy": services.healthy,
        "services": {one.name: one.model_dump(mode="json", exclude={"name"}) for one in services.services},
    }


def _bundles(output: Output) -> dict[str, Any]:
    """Desired against live, by bundle."""
    from infra.settings import Settings
    from tasks.standing import WRONG_VIEW, standing

    result = standing(Settings.load())
    table = Table("bundle", "adapters", "desired", "its state", "channel", "live", "up to date")
    for name, one in result.items():
        table.add_row(
            name,
            str(len(one["adapters"]))
            + (f" (waiting for {', '.join(one['waiting_for'])})" if one["waiting_for"] else ""),
            (one["desired_bundle_id"] or "not merged")[:12],
            one["desired_state"] or "-",
            one["channel"],
            f"version {one['live_version']} ({one['live_bundle_id'][:12]})"
            if one["live_version"]
            else "nothing",
            "yes" if one["up_to_date"] else "no",
        )
    output.show(table)
    for name, one in result.items():
        if one["mlflow_shows"] != one["live_bundle_id"]:
            output.show(
                f"{name}: MLflow shows {(one['mlflow_shows'] or 'nothing')[:12]} as live, devices get "
                f"{(one['live_bundle_id'] or 'nothing')[:12]} ({WRONG_VIEW}): `hydraopt reconcile` corrects it"
            )
    return result


def _adapter_line(result: dict[str, Any]) -> str:
    score = "not measured" if result["value"] is None else f"{result['metric']} {result['value']:.4f}"
    return (
        f"{result['task']} serves version {result['version']} ({result['digest'][:12]}): {score}, "
        f"{result['bytes']:,} bytes"
    )


def _bundle_line(name: str, bundle: dict[str, Any]) -> str:
    if bundle["state"] == "waiting":
        missing = ", ".join(bundle["waiting_for"]) or "any task: none is registered for its base model"
        return f"{name}: waiting for adapters of {missing}"
    if bundle["state"] == "changing":
        return (
            f"{name}: an adapter was registered while it was merged: run it again. If none was, the runner has other "
            "code than this command: `hydraopt down` and `hydraopt up`"
        )
    gates = "gates passed" if bundle["passed"] else "gates FAILED"
    line = f"{name}: {bundle['state']}, candidate {bundle['bundle_id'][:12]}, {gates}, {bundle['candidate_state']}"
    if bundle["version"] is not None:
        line += (
            f"; it was version {bundle['version']} and is not live: "
            f"`hydraopt rollback {name} --to {bundle['version']}` makes it live again"
        )
    return line
