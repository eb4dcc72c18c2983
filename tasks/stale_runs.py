"""Runs whose process is gone, but which Prefect calls running for ever: found, and closed.

Only merges and trainings: they hold a slot or a checkpoint folder that the next one needs. A run that waits for
a person is suspended, has no process by nature, and is never touched.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import filelock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.filters import EventFilter
from prefect.runtime import flow_run
from prefect.states import Crashed

from infra.settings import Settings
from tasks.prefect_pages import every_flow_run
from tasks.verb import verb

REAPED_FLOWS = ("merge-set", "finetune-task")
"""The flows whose dead runs are closed. Each says :func:`stay_alive` first."""

_SILENCE = timedelta(minutes=15)  # many heartbeats: those of a minute may be lost with a killed server
_HEARTBEAT = "prefect.flow-run.heartbeat"

_held: list[filelock.BaseFileLock] = []


def stay_alive(settings: Settings) -> None:
    """Let others on this machine see that this run's process lives: it holds a lock that dies with it.

    Held to the end of the process and not of the flow: in between, Prefect is still told how the run ended.
    """
    lock = filelock.FileLock(_path(settings, str(flow_run.id)), thread_local=False)
    lock.acquire()
    _held.append(lock)


@verb(task_run_name="close runs whose process is gone")
def close_dead_runs(settings: Settings) -> list[str]:
    """Set every dead run of a merge or a training to Crashed, which frees what it holds; returns their names.

    A run of this machine is dead if nobody holds its lock. One of another machine is dead if it sent heartbeats
    and has sent none for a quarter of an hour.
    """
    closed = []
    with get_client(sync_client=True) as client:
        running = every_flow_run(
            client,
            flow_filter=FlowFilter.model_validate({"name": {"any_": list(REAPED_FLOWS)}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType.RUNNING]}}}),
        )
        for run in running:
            if _is_dead(client, settings, run) and _still_running(client, run):
                client.set_flow_run_state(run.id, Crashed(message="the process of this run is gone"))
                closed.append(run.name)
    _clear_locks(settings)
    return closed


def _is_dead(client: SyncPrefectClient, settings: Settings, run: FlowRun) -> bool:
    path = _path(settings, str(run.id))
    if path.exists():
        return _nobody_holds(path)
    of_this_run = {"event": {"name": [_HEARTBEAT]}, "resource": {"id": [f"prefect.flow-run.{run.id}"]}}
    heard = client.read_events(EventFilter.model_validate(of_this_run), limit=1).events  # the newest
    # One that was never heard may be alive with its heartbeats switched off.
    return bool(heard) and heard[0].occurred < datetime.now(UTC) - _SILENCE


def _still_running(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether Prefect has not heard of its end meanwhile. A dead process says nothing more."""
    state = client.read_flow_run(run.id).state
    return state is not None and state.is_running()


def _clear_locks(settings: Settings) -> None:
    """Remove the locks that dead processes left."""
    for path in _folder(settings).glob("*.lock"):
        if _nobody_holds(path):
            path.unlink(missing_ok=True)


def _nobody_holds(path: Path) -> bool:
    try:
        with filelock.FileLock(path, timeout=0, thread_local=False):
            return True
    except filelock.Timeout:
        return False


def _path(settings: Settings, run_id: str) -> Path:
    return _folder(settings) / f"{run_id}.lock"


def _folder(settings: Settings) -> Path:
    folder = settings.home / "locks" / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
