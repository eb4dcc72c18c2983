"""The command ``hydraopt demo``."""

from __future__ import annotations

from typing import Any

import click

from flows.command_line.output import Output, command


@command("demo")
@click.option("--keep", is_flag=True, help="Leave the services running at the end.")
def demo(output: Output, keep: bool) -> dict[str, Any]:
    """Run the whole pipeline on a small real example: a few minutes on two cores.

    Starts the local services, trains adapters, merges, judges, approves, publishes, pulls, updates one and
    rolls back. All state is below HYDRAOPT_HOME (default .hydraopt). Run it again: what did not change is
    not done again.

    Example: hydraopt demo --keep
    """
    from flows.demo.run import run_demo

    return run_demo(output, keep=keep)
