"""What the commands that talk to servers share."""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from flows.command_line.output import Output

if TYPE_CHECKING:
    from infra.settings import Settings


@contextlib.contextmanager
def connected(output: Output) -> Iterator[Settings]:
    """Servers that answer, and tasks that report to this command's progress."""
    from flows.connection import connect, running_flows

    settings = connect(verbose=output.verbose)

    from tasks.verb import reporting

    with running_flows(settings), output.progress() as progress, reporting(progress):
        yield settings


def channel_of(settings: Settings, bundle: str) -> str:
    """The channel a bundle is released to."""
    from infra.pipeline_spec import load_specs

    return next((spec.channel for spec in load_specs(settings.home) if spec.name == bundle), "stable")


def live_line(result: dict[str, Any]) -> str:
    """What a channel shows after a move, in a line."""
    return (
        f"{result['name']}, channel {result['channel']}: version {result['live_version']} "
        f"({result['live_bundle_id'][:12]}) is live"
    )


def user_name() -> str:
    """The name by which this machine knows who runs the command, as records spell names."""
    from hydraopt.names import slug

    return slug(getpass.getuser()).strip(".-") or "unknown"
