"""The flow ``reconcile``: bring every candidate up to date, and finish what was left half-done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Annotated, Any
from uuid import UUID

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.approve_in_ui import open_form
from flows.deployed_run import run_deployed
from flows.release import release
from hydraopt.errors import HydraoptError, ServiceError
from infra.metrics import note_behind, note_reconcile
from infra.settings import Settings
from tasks.candidates import (
    describe_candidate,
    find_candidate,
    former_version,
    judge_candidate,
    needs_measuring,
    read_signed,
    show_candidate,
)
from tasks.desired import DesiredSet, read_desired
from tasks.log_lines import on_every_line, say
from tasks.notifying import note_reconciled
from tasks.releasing import finish_moves, show_live
from tasks.sign_off import asks_in_ui, candidate_status
from tasks.stale_runs import close_dead_runs
from tasks.standing import WRONG_VIEW
from tasks.waiting_runs import close_waiting, reconciles_that_wait

_LONGEST_SETTLE_S = 60.0
_Seconds = Annotated[float, Field(ge=0, le=_LONGEST_SETTLE_S)]
_FIXED_STEPS = 10
"""Task runs of a merge-set beside the two per adapter, for its progress bar."""


@flow(name="reconcile")
def reconcile(settle_s: _Seconds = 0) -> dict[str, Any]:
    """Compare what serves with what was merged; merge what is new, release what was signed off.

    Works on levels, not on events: a schedule, a person and a retry after a crash all end in the same
    place. When nothing changed it merges nothing and takes about a second.

    Args:
        settle_s: Wait until nothing was registered for so many seconds, at most a minute: adapters that come
            one after another are merged once.

    Returns:
        ``bundles``: by name, its ``state`` (``unchanged``, ``merged``, ``waiting`` for adapters or
        ``changing`` right now), ``fingerprint``, ``bundle_id``, whether its gates ``passed``,
        ``candidate_state``, and as ``version`` under which number it was released before, if it was and is not live;
        ``released``: what an interrupted approval had left to publish; ``corrected_in_mlflow``: by name, the bundle
        that MLflow showed as live though another one is; ``seconds``.

    Raises:
        HydraoptError: If a bundle could not be merged or released. The others were, before this is raised.
    """
    settings = Settings.load().require_services()
    started = time.monotonic()
    bundles = None
    try:
        result = _reconcile(settings, settle_s)
        bundles = result["bundles"]
    finally:
        seconds = time.monotonic() - started
        note_reconcile(settings.home, seconds=seconds, bundles=bundles)
    return {**result, "seconds": round(seconds, 3)}


def _reconcile(settings: Settings, settle_s: float) -> dict[str, Any]:
    """One pass over everything there is to bring up to date."""
    close_dead_runs(settings)
    desired, asked = _settled(settings, settle_s)
    problems: list[HydraoptError] = []
    bundles = {}
    for one in desired:
        with _held_back(problems), on_every_line(settings, bundle=one.spec.name, fingerprint=one.fingerprint):
            bundles[one.spec.name] = _bring_up_to_date(settings, one)
    channels = {one.spec.name: one.spec.channel for one in desired}
    released = []
    for candidate in read_signed(settings):
        with _held_back(problems):
            channel = channels.get(candidate.name, "stable")
            released.append(release(candidate.name, candidate.bundle_id, channel))
    for name, bundle in bundles.items():
        if "bundle_id" in bundle:
            with _held_back(problems):
                bundle["candidate_state"] = _asked_for(settings, name, bundle["bundle_id"])
    for name in channels:
        with _held_back(problems):
            finish_moves(settings, name)
    shown = {name: show_live(settings, name, channel) for name, channel in channels.items()}
    corrected = {name: showed for name, showed in shown.items() if showed is not None}
    for name, showed in corrected.items():
        say("MLflow showed %s of %s as live (%s); corrected", showed, name, WRONG_VIEW)
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))
    note_reconciled(settings)
    close_waiting(asked, Completed(message=f"the run {flow_run.name} did the same meanwhile"))
    return {"bundles": bundles, "released": released, "corrected_in_mlflow": corrected}


def _settled(settings: Settings, quiet_s: float) -> tuple[list[DesiredSet], frozenset[UUID]]:
    """What is wanted, once that has not changed for ``quiet_s`` seconds, or as it is after a minute.

    Returns:
        That, and the runs that others asked for and that wait for the same.
    """
    end = time.monotonic() + _LONGEST_SETTLE_S
    waiting, desired = reconciles_that_wait(), read_desired(settings, remember=True)
    while quiet_s and time.monotonic() < end:
        time.sleep(quiet_s)
        before, waiting, desired = desired, reconciles_that_wait(), read_desired(settings, remember=True)
        if before == desired:
            break
    close_waiting(waiting.triggered, Cancelled(message="another run does the same already"))
    return desired, waiting.asked


@contextlib.contextmanager
def _held_back(problems: list[HydraoptError]) -> Iterator[None]:
    """Note what is wrong with one bundle and go on with the next. A dead server ends the run."""
    try:
        yield
    except ServiceError:
        raise
    except HydraoptError as problem:
        problems.append(problem)


def _asked_for(settings: Settings, name: str, bundle_id: str) -> str:
    """Where a candidate stands. If it waits and the policy counts Prefect's form, there is one: never a second one."""
    state = candidate_status(settings, name, bundle_id).state
    if state == "awaiting-approval" and asks_in_ui(settings, name):
        open_form(name, bundle_id)
    return state


def _bring_up_to_date(settings: Settings, desired: DesiredSet) -> dict[str, Any]:
    """Have the bundle's set merged, measured and judged."""
    if desired.fingerprint is None:
        return {"state": "waiting", "waiting_for": list(desired.waiting_for)}
    name = desired.spec.name
    bundle_id = find_candidate(settings, desired)
    state = "unchanged"
    if bundle_id is None or needs_measuring(settings, desired, bundle_id):
        say("no judged candidate of this set yet: merge-set is started")
        note_behind(settings.home, name, behind=True)
        steps = _FIXED_STEPS + 2 * len(desired.versions)
        run_deployed("merge-set", {"bundle": name}, steps=steps, work=f"{name}:{desired.fingerprint}")
        state = "merged"
        bundle_id = find_candidate(settings, desired)
    if bundle_id is None:
        # Another adapter was registered meanwhile: that set was merged, and the next run looks again.
        return {"state": "changing", "fingerprint": desired.fingerprint}
    describe_candidate(settings, desired, bundle_id)
    report = judge_candidate(settings, desired, bundle_id)
    show_candidate(settings, desired, bundle_id, report)
    note_behind(settings.home, name, behind=False)
    return {
        "state": state,
        "fingerprint": desired.fingerprint,
        "bundle_id": bundle_id,
        "passed": report.passed,
        "version": former_version(settings, desired, bundle_id),
    }
