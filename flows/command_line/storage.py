"""Commands on the object store as a whole: garbage, copies, and what others show of it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import click

from flows.command_line.connected import connected
from flows.command_line.output import Output, command


@command("gc")
@click.option("--delete", is_flag=True, help="Remove what was found; without it nothing is removed.")
@click.option("--older-than", type=float, default=30.0, show_default=True, help="Least age in days.")
@click.option(
    "--keep-versions",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Newest versions of every bundle that stay whole.",
)
def gc(output: Output, delete: bool, older_than: float, keep_versions: int) -> dict[str, Any]:
    """Find files in the store that nothing needs; remove them with --delete.

    Stays: what a channel shows or showed just before, the newest versions, undecided candidates, every adapter,
    every record. A version whose files went cannot come back by rollback.

    Example: hydraopt gc --older-than 30 --keep-versions 10
    """
    from infra.garbage import collect_garbage
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    if not 0 <= older_than <= 36500:
        raise click.UsageError(f"--older-than is {older_than:g}: give 0 to 36500 days")
    with output.progress() as progress:
        found = collect_garbage(
            ObjectStore(Settings.load()),
            older_than=timedelta(days=older_than),
            keep_versions=keep_versions,
            remove=delete,
            progress=progress,
        )
    what = "removed" if delete else "could be removed (nothing was: --delete does it)"
    output.show(f"{found.blobs} files, {found.bytes:,} bytes {what}")
    output.show(
        f"kept: {found.kept_blobs} files of {found.kept_bundles} bundles and the adapters; "
        f"{found.too_young} files are younger than {older_than:g} days"
    )
    return found.model_dump(mode="json")


@command("repair")
def repair(output: Output) -> dict[str, Any]:
    """Make MLflow and Prefect show again what the store holds, after losing either's database.

    Brings back adapters and which of them serve, bundles with their scores, aliases, and the pages' tables.
    Deployments come back with `hydraopt up`.

    Example: hydraopt repair
    """
    with connected(output):
        from flows.repair import repair as repair_flow

        result = repair_flow()
    output.show(
        f"shown again: {result['adapters']} adapter versions ({result['serving_brought_back']} serve again), "
        f"{result['bundles']} bundles"
    )
    for name, channels in result["channels"].items():
        for channel, version in channels.items():
            output.show(f"{name}, channel {channel}: version {version} is live")
    return result


@click.group("store")
def store() -> None:
    """Copy the whole object store into a folder, or back.

    Example: hydraopt store export /backup/store
    """


@command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def export(output: Output, folder: Path) -> dict[str, Any]:
    """Copy every object into FOLDER, each checked; a copy that is there is brought up to date.

    Example: hydraopt store export /backup/store
    """
    from infra.store_copy import export_store

    return _copy(output, export_store, folder, "holds")


@command("restore")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
def restore(output: Output, folder: Path) -> dict[str, Any]:
    """Put the copy in FOLDER back into an empty store. Everything is checked before anything is written.

    A restore that was interrupted goes on where it stopped. Then run `hydraopt repair`.

    Example: hydraopt store restore /backup/store
    """
    from infra.store_copy import restore_store

    return _copy(output, restore_store, folder, "is in the store:")


store.add_command(export)
store.add_command(restore)


def _copy(output: Output, verb: Any, folder: Path, done: str) -> dict[str, Any]:
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    with output.progress() as progress:
        copied = verb(ObjectStore(Settings.load()), folder.absolute(), progress)
    output.show(f"{folder} {done} {copied.objects} objects, {copied.bytes:,} bytes; {copied.copied} were new")
    return copied.model_dump(mode="json")


__all__ = ["gc", "repair", "store"]
