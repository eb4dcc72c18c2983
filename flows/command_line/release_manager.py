"""Commands of the release manager and of devices: candidates, sign-off, channels, pull."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from flows.command_line.connected import channel_of, connected, live_line, user_name
from flows.command_line.output import Output, command

_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)
_KEPT_FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


@command("candidates")
@click.option("--name", help="Only candidates of this bundle.")
def candidates(output: Output, name: str | None) -> dict[str, Any]:
    """List every bundle that was merged and where it stands, newest first.

    Example: hydraopt candidates
    """
    from infra.approvers import approvers_of
    from infra.candidates import list_candidates
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    settings = Settings.load()
    found = list_candidates(ObjectStore(settings), name, partial(approvers_of, settings.home))
    table = Table(
        "bundle", "id", "state", "version", "tasks", "of input bytes", "mean drop", "approvals", "by"
    )
    for one in found:
        table.add_row(
            one.name,
            one.bundle_id[:12],
            one.state,
            str(one.version or "-"),
            str(len(one.tasks)),
            f"{one.storage_ratio:.3f}",
            _percent(one.mean_drop_percent),
            "-" if one.approvals is None else f"{one.approvals} of {one.approvals_needed}",
            ", ".join(one.approved_by) or one.decided_by or "-",
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

    The signature binds the bundle, its gate report and the policy in the bundle's file. Where the policy wants
    several people, the last one's approval releases. A candidate whose gates failed is refused (exit 3).

    Example: hydraopt approve 1f3a9c --as ana --key ana.pem
    """
    from hydraopt.errors import RecordError
    from infra.approvers import approvers_of
    from infra.candidates import approve as sign
    from infra.candidates import count, list_candidates, resolve
    from infra.object_store import ObjectStore
    from infra.settings import Settings
    from infra.signatures import load_private_key

    settings = Settings.load()
    store = ObjectStore(settings)
    private = load_private_key(key)
    bundle, whole_id = resolve(store, bundle_id, name)
    approvers = approvers_of(settings.home, bundle)
    signed = sign(store, bundle, whole_id, who, private, approvers)
    sign_off = count(store, bundle, whole_id, approvers)
    output.show(f"{bundle} {whole_id[:12]} is approved by {signed['as']}: {sign_off.missing}")
    newer = None
    with suppress(RecordError):  # a hint: a damaged record of another candidate stops nothing
        newest = list_candidates(store, bundle)[0]
        if newest.bundle_id != whole_id and newest.state != "rejected":
            newer = newest.bundle_id
            output.note(
                f"{bundle} has a newer candidate, {newer[:12]} ({newest.state}): this one holds adapters or "
                "settings that were replaced since"
            )
    result = {
        "approval": signed,
        "approvals": len(sign_off.by),
        "approved_by": sign_off.by,
        "needed": sign_off.needed,
        "not_counted": sign_off.ignored,
        "newer_candidate": newer,
        "released": None,
    }
    if not release or not sign_off.complete:
        return result
    with connected(output):
        from flows.release import release as release_flow

        released = release_flow(bundle, whole_id, channel_of(settings, bundle))
    output.show(live_line(released))
    if released["live_version"] != released["version"]:
        output.show(
            f"{bundle} {whole_id[:12]} is version {released['version']}, which was taken back or followed by a newer "
            f"one: `hydraopt rollback {bundle} --to {released['version']}` makes it live again"
        )
    return result | {"released": released}


@command("reject")
@click.argument("bundle_id", metavar="ID")
@click.option(
    "--as", "who", required=True, help="Who rejects; any name: to stop a release takes no key and no right."
)
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


@command("promote")
@click.argument("name")
@click.option(
    "--from", "source", default="canary", show_default=True, help="The channel it proved itself on."
)
@click.option("--to", "target", default="stable", show_default=True, help="The channel that gets it.")
@click.option("--as", "who", help="Who promotes; without it, your user name on this machine.")
def promote(output: Output, name: str, source: str, target: str, who: str | None) -> dict[str, Any]:
    """Publish what is live on one channel of bundle NAME to another; approvals and gates are checked again.

    Give the bundle's file `channel: canary`, and an approval releases to the canary first.

    Example: hydraopt promote support --from canary --to stable
    """
    with connected(output):
        from flows.promote import promote as promote_flow

        result = promote_flow(name, source, target, who or user_name())
    output.show(live_line(result))
    return result


@command("rollback")
@click.argument("name")
@click.option("--to", type=click.IntRange(min=1), help="The version; without it the one before.")
@click.option("--channel", help="The channel; without it the bundle's own.")
def rollback(output: Output, name: str, to: int | None, channel: str | None) -> dict[str, Any]:
    """Move the channel of bundle NAME back to a version that was live before.

    Example: hydraopt rollback support --to 3
    """
    with connected(output) as settings:
        from flows.rollback import rollback as rollback_flow

        result = rollback_flow(name, channel or channel_of(settings, name), to)
    output.show(live_line(result))
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
    from infra.approvers import approvers_of
    from infra.device_pull import pull as pull_bundle
    from infra.object_store import ObjectStore
    from infra.settings import Settings

    settings = Settings.load()
    with output.progress() as progress:
        approvers = approvers_of(settings.home, name)
        pulled = pull_bundle(ObjectStore(settings), name, channel, out, approvers, progress)
    output.show(
        f"{out} holds {name} version {pulled.version}: fetched {pulled.fetched_files} files "
        f"({pulled.fetched_bytes:,} bytes), kept {pulled.reused_files}"
    )
    return {**pulled.model_dump(mode="json"), "out": out}


@command("notify")
@click.argument("name")
@click.option("--url-file", required=True, type=_KEPT_FILE, help="File whose only line is the URL; a secret.")
def notify(output: Output, name: str, url_file: Path) -> dict[str, Any]:
    """Keep an Apprise URL (mailtos://, slack://, jsons:// ...) in Prefect under NAME, and send a test message there.

    List it in HYDRAOPT_HOME/notifications.yaml as `tell: [apprise-url/NAME]`, and the flow `watch` tells what
    happens: candidates, releases, drift, silence.

    Example: hydraopt notify releases --url-file url.txt
    """
    from hydraopt.names import check_name

    check_name(name, "name of a notification block")
    with connected(output):
        from tasks.notifying import save_url

        save_url(name, url_file.read_text(encoding="utf-8").strip())
    output.show(f"apprise-url/{name} works: a test message is on its way")
    return {"block": f"apprise-url/{name}"}


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
    made = generate_key(key)
    try:
        public = trust(home, who, made)
    except BaseException:
        if who not in trusted(home):
            key.unlink()  # it would only be in the way of the next attempt
        raise
    output.show(f"private key: {key}\ntrusted as {who}: {public}")
    return {"who": who, "key": key, "public_key": public}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"
