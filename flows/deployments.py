"""The deployments of ``infra/prefect.yaml``: what a runner or a worker registers with Prefect when it starts."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events import DeploymentTriggerTypes
from prefect.flows import load_flow_from_entrypoint
from prefect.schedules import Cron, Interval, Schedule
from prefect.states import Crashed
from pydantic import BaseModel, ConfigDict, Field

import infra
from hydraopt.evaluation.yaml_file import read_yaml
from tasks.prefect_pages import every_flow_run

Pool = Literal["cpu", "gpu"]

PROCESSES = 8
"""Runs that one runner or worker has at a time: more than there are flows that wait for others, so that a waiting
reconcile never keeps its merge-set from starting."""


class _WorkPool(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Pool


class _Every(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    interval: float | None = Field(None, gt=0, description="Seconds.")
    cron: str | None = None
    timezone: str | None = None

    def schedule(self) -> Schedule:
        """The same as Prefect's object.

        Raises:
            ValueError: If it names neither or both of interval and cron.
        """
        if (self.interval is None) == (self.cron is None):
            raise ValueError(f"a schedule has an interval or a cron, got {self!r}")
        if self.cron is not None:
            return Cron(self.cron, timezone=self.timezone)
        return Interval(timedelta(seconds=self.interval or 0), timezone=self.timezone)


class DeploymentEntry(BaseModel):
    """One entry of the file. What is not known here is refused: it would do nothing in the local profile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    entrypoint: str = Field(pattern=r"^flows\.\w+\.\w+$")
    work_pool: _WorkPool
    parameters: dict[str, Any] = Field(default_factory=dict)
    schedules: tuple[_Every, ...] = ()
    triggers: tuple[DeploymentTriggerTypes, ...] = ()
    concurrency_limit: ConcurrencyLimitConfig | None = None

    def deployment(self) -> RunnerDeployment:
        """The entry as Prefect registers it."""
        return load_flow_from_entrypoint(self.entrypoint).to_deployment(
            self.name,
            parameters=self.parameters,
            schedules=[every.schedule() for every in self.schedules],
            triggers=list(self.triggers),
            concurrency_limit=self.concurrency_limit,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )


def read_entries(pool: Pool | None = None) -> list[DeploymentEntry]:
    """The entries of the file; with ``pool`` only those it runs."""
    content = read_yaml(Path(infra.__file__).with_name("prefect.yaml"))
    entries = [DeploymentEntry.model_validate(entry) for entry in content["deployments"]]
    return [entry for entry in entries if pool is None or entry.work_pool.name == pool]


def clear_leftovers(entries: list[DeploymentEntry]) -> None:
    """Close the runs of an executor that was killed, and drop schedule slots that passed meanwhile.

    Prefect would call the former "running" for good, holding their concurrency slot for minutes, and run
    each of the latter. One process executes an entry, so whatever is open when it starts is left over.
    """
    ours = DeploymentFilter(name=DeploymentFilterName(any_=[entry.name for entry in entries]))
    with get_client(sync_client=True) as client:
        for run in every_flow_run(client, deployment_filter=ours, flow_run_filter=_in("RUNNING", "PENDING")):
            client.set_flow_run_state(
                run.id, Crashed(message="the process that executed this run was killed")
            )
        for run in every_flow_run(client, deployment_filter=ours, flow_run_filter=_in("SCHEDULED")):
            if run.auto_scheduled:
                client.delete_flow_run(run.id)


def _in(*states: str) -> FlowRunFilter:
    """Flow runs in one of ``states``."""
    return FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType(state) for state in states]}}})
