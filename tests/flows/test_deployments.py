"""The deployments file: what it says is what both profiles register."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from flows.deployments import DeploymentEntry, read_entries
from infra.change_events import set_changed

ENTRY = {"name": "reconcile", "entrypoint": "flows.reconcile.reconcile", "work_pool": {"name": "cpu"}}


def test_every_flow_is_a_deployment_of_its_own_name():
    """Callers start `NAME/NAME`, and a worker imports the entry point."""
    made = {entry.name: entry.deployment() for entry in read_entries()}
    assert set(made) >= {
        "ingest-adapter",
        "finetune-task",
        "merge-set",
        "reconcile",
        "retrain",
        "release",
        "rollback",
    }
    for name, deployment in made.items():
        assert deployment.flow_name == name
        assert ":" not in deployment.entrypoint  # by module: no folder has to be the right one


def test_what_computes_runs_on_the_gpu_pool():
    assert {entry.name for entry in read_entries("gpu")} == {"finetune-task", "merge-set"}
    assert len(read_entries("gpu")) + len(read_entries("cpu")) == len(read_entries())


def test_what_must_not_run_twice_queues_behind_itself():
    """CANCEL_NEW would lose the change that arrives while a merge runs."""
    for entry in read_entries():
        deployment = entry.deployment()
        if entry.name in {"reconcile", "retrain", "merge-set", "finetune-task"}:
            assert deployment.concurrency_limit == 1
            assert deployment.concurrency_options.collision_strategy.value == "ENQUEUE"
        else:
            assert deployment.concurrency_limit is None


def test_reconcile_runs_every_five_minutes():
    schedules = {entry.name: entry.deployment().schedules for entry in read_entries()}
    (every,) = schedules.pop("reconcile")
    assert every.schedule.interval.total_seconds() == 300


def test_the_trigger_waits_for_the_event_that_registrations_send():
    """The yaml file and the code name the event and its resource each by itself."""
    (trigger,) = next(entry for entry in read_entries() if entry.name == "reconcile").triggers
    event = set_changed("org/base-7B", "mood", "registered")
    assert trigger.expect == {event["event"]}
    assert trigger.match.matches(event["resource"])
    assert trigger.within == trigger.schedule_after, "an event could fall between two runs"
    assert trigger.parameters == {"settle_s": trigger.within.total_seconds()}


@pytest.mark.parametrize(
    "change",
    [
        {"work_queue": "x"},
        {"entrypoint": "flows/reconcile.py:reconcile"},
        {"work_pool": {"name": "tpu"}},
        {"schedules": [{"interval": 0}]},
        {"concurrency_limit": {"limit": 1, "collision_strategy": "SOMEHOW"}},
    ],
)
def test_what_would_do_nothing_is_refused(change):
    with pytest.raises(ValidationError):
        DeploymentEntry.model_validate(ENTRY | change)


@pytest.mark.parametrize("schedule", [{}, {"interval": 5, "cron": "* * * * *"}])
def test_a_schedule_says_one_thing(schedule):
    entry = DeploymentEntry.model_validate(ENTRY | {"schedules": [schedule]})
    with pytest.raises(ValueError, match="an interval or a cron"):
        entry.deployment()


def test_a_cron_schedule_keeps_its_time_zone():
    entry = DeploymentEntry.model_validate(
        ENTRY | {"schedules": [{"cron": "0 6 * * 1", "timezone": "Europe/Madrid"}]}
    )
    (every,) = entry.deployment().schedules
    assert (every.schedule.cron, every.schedule.timezone) == ("0 6 * * 1", "Europe/Madrid")
