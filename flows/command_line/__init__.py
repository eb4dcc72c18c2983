"""The command line: ``hydraopt COMMAND``.

Commands are imported when they run, so ``hydraopt --help`` is quick, and the library's commands work in
an installation without the pipeline extra.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import click

from flows.command_line.process_memory import keep_memory
from flows.command_line.standard_streams import lead_nowhere, open_closed_streams

# Before torch is loaded, here and in the processes started from here: its threads otherwise spin while they
# wait for one another, and where a core is busy with something else a training step takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


class _Command(NamedTuple):
    module: str
    help: str


_LIBRARY = {
    "merge": "Merge task adapters into one small bundle.",
    "frontier": "Error over storage for every merge method.",
    "inspect": "What an adapter or a bundle holds.",
    "verify": "Check a bundle's digests, shapes and values.",
    "export": "Write a bundle's tasks as ordinary PEFT folders.",
    "evaluate": "Measure an adapter or a bundle on a task.",
}
_MANY_TENSORS = frozenset({"merge", "frontier"})
_PIPELINE = {
    "up": "Start the local services.",
    "down": "Stop the local services.",
    "status": "Show the services, and desired against live bundles.",
    "finetune": "Train an adapter for a task and register it.",
    "ingest": "Bring a finished adapter into the registry.",
    "reconcile": "Bring the candidate bundle up to date with the adapters, now.",
}
_RELEASE = {
    "candidates": "List bundles and where each stands.",
    "approve": "Sign a candidate off and release it.",
    "reject": "Turn a candidate down for good.",
    "promote": "Publish what one channel shows to another.",
    "rollback": "Move a channel back to an earlier version.",
    "pull": "Fetch the live bundle as a device does: only what changed.",
    "notify": "Have releases, candidates and silence told by mail, Slack or a web hook.",
    "keygen": "Make an approver's signing key.",
}
_STORE = {
    "repair": "Make MLflow and Prefect show again what the store holds.",
    "store": "Copy the whole object store into a folder, or back.",
    "gc": "Find files in the store that nothing needs, and remove them.",
}

COMMANDS: dict[str, _Command] = {
    **{name: _Command("flows.command_line.library", text) for name, text in _LIBRARY.items()},
    **{name: _Command("flows.command_line.pipeline", text) for name, text in _PIPELINE.items()},
    **{name: _Command("flows.command_line.release_manager", text) for name, text in _RELEASE.items()},
    **{name: _Command("flows.command_line.storage", text) for name, text in _STORE.items()},
    "demo": _Command("flows.command_line.demo", "All of it on a small real example, start to finish."),
}
"""Where each command lives: the module holds a click command under the command's own name."""


class _LazyGroup(click.Group):
    """A group that imports a command's module only when that command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names in the order a reader meets them: library, pipeline, demo."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import the command, or None if there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in _MANY_TENSORS:
            keep_memory()
        return getattr(importlib.import_module(COMMANDS[cmd_name].module), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """Write the commands by section, without importing any."""
        sections = {
            "Library (no server needed)": list(_LIBRARY),
            "Pipeline": [*_PIPELINE, *_RELEASE, *_STORE, "demo"],
        }
        for title, names in sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, COMMANDS[name].help) for name in names])

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run as click does; with ``--json`` a usage error is a JSON object on stdout as well."""
        open_closed_streams()
        given = list(sys.argv[1:] if args is None else args)
        if not extra.pop("standalone_mode", True):
            return super().main(given, *rest, standalone_mode=False, **extra)
        try:
            code = super().main(given, *rest, standalone_mode=False, **extra)
        except click.ClickException as error:
            try:
                error.show()
                if "--json" in given:
                    failure = {"error": error.format_message(), "kind": "usage", "exit_code": error.exit_code}
                    click.echo(json.dumps(failure))
            except OSError:
                lead_nowhere(sys.stdout)
                lead_nowhere(sys.stderr)
            sys.exit(error.exit_code)
        except OSError as error:  # while it was printed what there is; a command tells of its own
            lead_nowhere(sys.stdout)
            click.echo(f"hydraopt: {error}", err=True)
            sys.exit(1)
        except (click.Abort, KeyboardInterrupt):
            click.echo("hydraopt: interrupted", err=True)
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="hydraopt")
def main() -> None:
    """Keep many task adapters of one language model as one small bundle.

    Example: hydraopt merge adapters/mood adapters/topic --budget 0.25 --out bundle
    """
