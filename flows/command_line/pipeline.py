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
    from infra.local_services import ServiceStatus
    from infra.local_services.profiles import Profile
    from infra.settings import Settings

_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)
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
    from infra.settings import Settings

    with output.progress() as progress:
        services = local_services.down(Settings.load().home, progress=progress)
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
    with _connected(output):
        from flows.reconcile import reconcile as reconcile_flow

        result = reconcile_flow()
    for name, bundle in result["bundles"].items():
        output.show(_bundle_line(name, bundle))
    for one in result["released"]:
        output.show(_live_line(one))
    if not result["bundles"]:
        output.show("no adapter is registered yet: see `hydraopt finetune` and `hydraopt ingest`")
    return result


@command("candidates")
@click.option("--name", help="Only candidates of this bundle.")
def candidates(output: Output, name: str | None) -> dict[str, Any]:
    """List every bundle that was merged and where it stands, newest first.

    Example: hydraopt candidates
    """
    from infra.candidates import list_candidates
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    found = list_candidates(ObjectStore(Settings.load()), name)
    table = Table("bundle", "id", "state", "version", "tasks", "of input bytes", "mean drop", "by")
    for one in found:
        table.add_row(
            one.name,
            one.bundle_id[:12],
            one.state,
            str(one.version or "-"),
            str(len(one.tasks)),
            f"{one.storage_ratio:.3f}",
            _percent(one.mean_drop_percent),
            one.decided_by or "-",
        )
    output.show(table)
    for one in found:
        for failure in one.failures:
            output.show(f"{one.bundle_id[:12]}: {failure}")
    return {"candidates": found}


@command("approve")
@click.argument("bundle_id", metavar="ID")
@click.option("--as", "who", required=True, help="Who approves; must be trusted here with this key.")
@click.option("--key", required=True, type=_KEPT_FILE, help="The approver's private key.")
@click.option("--name", help="Name of the bundle, if the id alone is not enough.")
@click.option("--release/--no-release", default=True, help="Whether to publish right away.")
def approve(
    output: Output, *, bundle_id: str, who: str, key: Path, name: str | None, release: bool
) -> dict[str, Any]:
    """Sign off the candidate ID (the first characters suffice) and release it.

    The signature binds the bundle and its gate report. A candidate whose gates failed is refused (exit 3).

    Example: hydraopt approve 1f3a9c --as ana --key ana.pem
    """
    from infra.approvers import trusted
    from infra.candidates import approve as sign_off
    from infra.candidates import resolve
    from infra.object_store import ObjectStore
    from infra.settings import Settings
    from infra.signatures import load_private_key

    settings = Settings.load()
    store = ObjectStore(settings)
    private = load_private_key(key)
    bundle, whole_id = resolve(store, bundle_id, name)
    signed = sign_off(store, bundle, whole_id, who, private, trusted(settings.home))
    output.show(f"{bundle} {whole_id[:12]} is approved by {signed['as']}")
    if not release:
        return {"approval": signed, "released": None}
    with _connected(output):
        from flows.release import release as release_flow

        released = release_flow(bundle, whole_id, _channel_of(settings, bundle))
    output.show(_live_line(released))
    return {"approval": signed, "released": released}


@command("reject")
@click.argument("bundle_id", metavar="ID")
@click.option("--as", "who", required=True, help="Who rejects.")
@click.option("--reason", required=True, help="Why; kept with the candidate.")
@click.option("--name", help="Name of the bundle, if the id alone is not enough.")
def reject(output: Output, bundle_id: str, who: str, reason: str, name: str | None) -> dict[str, Any]:
    """Turn the candidate ID down, for good: it can never be approved.

    Example: hydraopt reject 1f3a9c --as ana --reason "answers in the wrong language"
    """
    from infra.candidates import reject as turn_down
    from infra.candidates import resolve
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    store = ObjectStore(Settings.load())
    bundle, whole_id = resolve(store, bundle_id, name)
    record = turn_down(store, bundle, whole_id, who, reason)
    output.show(f"{bundle} {whole_id[:12]} is rejected by {record['as']}: {record['reason']}")
    return record


@command("rollback")
@click.argument("name")
@click.option("--to", type=click.IntRange(min=1), help="The version; without it the one before.")
@click.option("--channel", help="The channel; without it the bundle's own.")
def rollback(output: Output, name: str, to: int | None, channel: str | None) -> dict[str, Any]:
    """Move the channel of bundle NAME back to a version that was live before.

    Example: hydraopt rollback support --to 3
    """
    with _connected(output) as settings:
        from flows.rollback import rollback as rollback_flow

        result = rollback_flow(name, channel or _channel_of(settings, name), to)
    output.show(_live_line(result))
    return result


@command("pull")
@click.argument("name")
@click.option("--channel", default="stable", show_default=True, help="The channel to follow.")
@click.option("--out", required=True, type=_FOLDER, help="Where the bundle should be.")
def pull(output: Output, name: str, channel: str, out: Path) -> dict[str, Any]:
    """Fetch what is live of bundle NAME, as a device does: only what changed, verified, then switched to.

    Needs reading rights on the object store and the approvers' public keys, nothing else.

    Example: hydraopt pull support --channel stable --out /opt/models/support
    """
    from infra.approvers import trusted
    from infra.device_pull import pull as pull_bundle
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    settings = Settings.load()
    with output.progress() as progress:
        pulled = pull_bundle(ObjectStore(settings), name, channel, out, trusted(settings.home), progress)
    output.show(
        f"{out} holds {name} version {pulled.version}: fetched {pulled.fetched_files} files "
        f"({pulled.fetched_bytes:,} bytes), kept {pulled.reused_files}"
    )
    return {**pulled.model_dump(mode="json"), "out": out}


@command("keygen")
@click.argument("who")
@click.option("--key", required=True, type=_FILE, help="Where to write the private key.")
def keygen(output: Output, who: str, key: Path) -> dict[str, Any]:
    """Make a signing key for WHO, and trust it on this machine.

    The private key (mode 600) stays with WHO; the public one goes below HYDRAOPT_HOME/approvers, and from
    there to every machine that publishes or pulls.

    Example: hydraopt keygen ana --key ana.pem
    """
    from hydraopt.names import check_name
    from infra.approvers import trust, trusted
    from infra.settings import Settings
    from infra.signatures import generate_key

    home = Settings.load().home
    check_name(who, "approver name")
    if who in trusted(home):
        raise click.UsageError(
            f"{who!r} has a key already; remove {home / 'approvers' / who}.pem to replace it"
        )
    public = trust(home, who, generate_key(key))
    output.show(f"private key: {key}\ntrusted as {who}: {public}")
    return {"who": who, "key": key, "public_key": public}


@contextlib.contextmanager
def _connected(output: Output) -> Iterator[Settings]:
    """Servers that answer, and tasks that report to this command's progress."""
    from flows.connection import connect, running_flows

    settings = connect(verbose=output.verbose)

    from tasks.verb import reporting

    with running_flows(settings), output.progress() as progress, reporting(progress):
        yield settings


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
    from tasks.standing import standing

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
    return result


def _channel_of(settings: Settings, bundle: str) -> str:
    """The channel a bundle is released to."""
    from infra.pipeline_spec import load_specs

    return next((spec.channel for spec in load_specs(settings.home) if spec.name == bundle), "stable")


def _adapter_line(result: dict[str, Any]) -> str:
    score = "not measured" if result["value"] is None else f"{result['metric']} {result['value']:.4f}"
    return (
        f"{result['task']} serves version {result['version']} ({result['digest'][:12]}): {score}, "
        f"{result['bytes']:,} bytes"
    )


def _bundle_line(name: str, bundle: dict[str, Any]) -> str:
    if bundle["state"] == "waiting":
        return f"{name}: waiting for adapters of {', '.join(bundle['waiting_for'])}"
    if bundle["state"] == "changing":
        return f"{name}: an adapter was registered while it was merged; run it again"
    gates = "gates passed" if bundle["passed"] else "gates FAILED"
    return f"{name}: {bundle['state']}, candidate {bundle['bundle_id'][:12]}, {gates}"


def _live_line(result: dict[str, Any]) -> str:
    return (
        f"{result['name']}, channel {result['channel']}: version {result['live_version']} "
        f"({result['live_bundle_id'][:12]}) is live"
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
