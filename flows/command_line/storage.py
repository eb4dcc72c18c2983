"""Commands on the object store as a whole: garbage."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import click

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


__all__ = ["gc"]
