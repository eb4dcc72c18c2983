"""What starts a merge, how often, and what becomes of runs that died: on real servers, with tiny adapters."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

pytest.importorskip("prefect")

import tiny_tasks
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, LogFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.concurrency.sync import concurrency
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.events.filters import EventFilter
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Running, Scheduled, Suspended
from tiny_adapters import write_adapter

from flows.reconcile import reconcile
from flows.retrain import retrain
from infra import local_services
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import AdapterVersion, store_adapter
from infra.bundle_store import find_by_fingerprint
from infra.local_services import processes
from infra.object_store import ObjectStore
from infra.settings import Settings
from tasks.announcing import announce
from tasks.desired import DesiredSet, read_desired
from tasks.one_merge import MERGE_LIMIT
from tasks.stale_runs import close_dead_runs

pytestmark = pytest.mark.integration

BUNDLE = "tiny"
SPEC = {
    "name": BUNDLE,
    "base_model": "tests/tiny",
    "recipe": {"budget": 0.9},
    "approval": {"needed": 2, "expires_days": 30},
}
PATIENCE_S = 300  # a busy machine starts a flow's process in half a minute


class Deployment:
    """Running services, and what a test asks of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.settings = Settings.load(home)
        self.store = ObjectStore(self.settings)

    def register(self, name: str, seed: int, *, event: bool = True) -> AdapterVersion:
        """Store and register an adapter as ingest does, without a process of its own."""
        folder = write_adapter(self.home.parent / f"adapter-{name}-{seed}", seed)
        version = store_adapter(self.store, folder, task=name, source="test")
        AdapterRegistry(self.settings).register(version, f"s3://test/{version.key}")
        if event:
            announce(version)
            EventsWorker.drain_all()
        return version

    def desired(self) -> DesiredSet:
        return next(one for one in read_desired.fn(self.settings) if one.spec.name == BUNDLE)

    def merged(self) -> bool:
        """Whether there is a bundle of just the set that serves now."""
        return find_by_fingerprint(self.store, BUNDLE, str(self.desired().fingerprint)) is not None

    def runs(self, flow: str, *states: StateType) -> list[FlowRun]:
        """Runs of a flow, the newest first."""
        chosen = {"state": {"type": {"any_": list(states)}}} if states else {}
        with get_client(sync_client=True) as client:
            found = client.read_flow_runs(
                flow_filter=FlowFilter.model_validate({"name": {"any_": [flow]}}),
                flow_run_filter=FlowRunFilter.model_validate(chosen),
                limit=200,
            )
        return sorted(found, key=lambda run: run.created, reverse=True)

    def busy(self) -> list[FlowRun]:
        """Runs that an event, a person or another run started and that are not over."""
        open_states = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING)
        return [
            run
            for flow in ("reconcile", "merge-set")
            for run in self.runs(flow, *open_states)
            if not run.auto_scheduled or run.state.is_running()
        ]

    def lines_of(self, run: FlowRun) -> list[dict[str, Any]]:
        """What a run logged, from our own log: Prefect's server may be late."""
        path = self.home / "logs" / "flows.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line.get("run_id") == str(run.id)]

    def has_begun_to_merge(self, run: FlowRun) -> bool:
        return any("adapters are merged" in line["message"] for line in self.lines_of(run))


def wait(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory) -> Iterator[Deployment]:
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("HYDRAOPT_")]:
            patch.delenv(name)
        home = tmp_path_factory.mktemp("triggers") / "home"
        patch.setenv("HYDRAOPT_HOME", str(home))
        stack.callback(local_services.down, home)
        (home / "bundles").mkdir(parents=True)
        (home / "bundles" / f"{BUNDLE}.yaml").write_text(yaml.safe_dump(SPEC))
        local_services.up(home)
        made = Deployment(home)
        stack.enter_context(temporary_settings({PREFECT_API_URL: made.settings.prefect_api_url}))
        stack.callback(EventsWorker.drain_all)
        yield made


@pytest.fixture
def quiet(deployment: Deployment) -> Deployment:
    """Nothing goes on that an earlier test started."""
    wait(lambda: not deployment.busy(), "no run is open")
    return deployment


def test_a_burst_of_registrations_gives_one_merge_of_the_final_set(quiet):
    """Fifty, over longer than one window of the trigger, each with its event."""
    for number in range(50):
        quiet.register(f"task-{number}", number)
    wait(quiet.merged, "the set of fifty is merged")
    wait(lambda: not quiet.busy(), "everything the events started is over")
    assert len(quiet.runs("merge-set")) == 1
    assert len(quiet.desired().versions) == 50


def test_what_arrives_during_a_merge_is_merged_next_and_never_at_the_same_time(quiet):
    """The one slot is taken, so the first merge waits; two more sets come meanwhile."""
    before = len(quiet.runs("merge-set"))
    with concurrency(MERGE_LIMIT, strict=True, lease_duration=60):
        quiet.register("task-0", 1000)
        (waiting,) = wait(lambda: quiet.runs("merge-set", StateType.RUNNING), "a merge-set is running")
        time.sleep(3)
        assert not quiet.has_begun_to_merge(waiting), "it merges all the same"
    wait(lambda: quiet.has_begun_to_merge(waiting), "it merges")
    quiet.register("task-1", 1001)
    wait(quiet.merged, "the newest set is merged")
    wait(lambda: not quiet.busy(), "everything the events started is over")
    newest = quiet.runs("merge-set", StateType.COMPLETED)[: len(quiet.runs("merge-set")) - before]
    spans = sorted((run.start_time, run.end_time) for run in newest)
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans)), spans


def test_a_merge_leaves_tables_a_picture_a_link_log_lines_and_metrics(quiet):
    """For people beside the run in Prefect's pages; for machines as JSON lines and text files."""
    for number in (3, 4, 5):
        quiet.register(f"task-{number}", 1000 + number)
    wait(quiet.merged, "the set is merged")
    wait(lambda: not quiet.busy(), "the run is over")
    run = quiet.runs("merge-set", StateType.COMPLETED)[0]
    with get_client(sync_client=True) as client:
        made = client.read_artifacts(flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}}))
        logs = client.read_logs(LogFilter.model_validate({"flow_run_id": {"any_": [run.id]}}), limit=200)
    kinds = {one.key: one.type for one in made}
    assert kinds == {
        "candidate-tiny": "markdown",
        "gates-tiny": "table",
        "tasks-tiny": "table",
        "frontier-tiny": "image",
        "mlflow-tiny": "markdown",  # which a link is to Prefect
    }
    assert f"{quiet.settings.mlflow_uri}/#/models/bundle.tiny" in next(
        one.data for one in made if one.key == "mlflow-tiny"
    )
    picture = next(one.data for one in made if one.type == "image")
    assert base64.b64decode(picture.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")

    fingerprint = str(quiet.desired().fingerprint)
    bundle_id = str(find_by_fingerprint(quiet.store, BUNDLE, fingerprint))
    names = f"[bundle=tiny fingerprint={fingerprint[:12]} bundle_id={bundle_id[:12]}] "
    assert sum(line.message.startswith(names) for line in logs) >= 4
    judged = [line for line in quiet.lines_of(run) if line.get("task_run") == "judge tiny"]
    assert judged
    assert all((one["fingerprint"], one["bundle_id"]) == (fingerprint, bundle_id) for one in judged)

    text = "".join(path.read_text() for path in (quiet.home / "metrics").glob("*.prom"))
    assert 'hydraopt_gates_passed{bundle="tiny"} 0.0' in text  # nothing to measure these with
    assert 'hydraopt_reconcile_behind_since_timestamp_seconds{bundle="tiny"} 0.0' in text
    assert "hydraopt_merge_seconds{" in text


def test_a_lost_event_is_made_up_for_by_the_schedule(quiet):
    """Registered in silence; the next run of the schedule, moved to now, merges it."""
    quiet.register("task-2", 1002, event=False)
    assert not quiet.merged()

    def planned() -> list[FlowRun]:
        return [run for run in quiet.runs("reconcile", StateType.SCHEDULED) if run.auto_scheduled]

    run = wait(planned, "the schedule plans a reconcile")[0]
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Scheduled(), force=True)
    wait(quiet.merged, "the schedule's run merges it")


def test_a_run_whose_process_is_gone_is_closed_and_a_suspended_one_is_not(quiet):
    """Nobody reports the end: the runner is killed together with the merge it runs."""
    with concurrency(MERGE_LIMIT, strict=True, lease_duration=60):
        run = run_deployment("merge-set/merge-set", parameters={"bundle": BUNDLE}, timeout=0)
        waits = run_deployment(
            "merge-set/merge-set", parameters={"bundle": BUNDLE}, timeout=0, as_subflow=False
        )
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(waits.id, Suspended(timeout_seconds=3600), force=True)
        lock = quiet.home / "locks" / "runs" / f"{run.id}.lock"
        wait(lock.exists, "the merge-set lives")
        mark = processes.mark(quiet.home, "runner")
        while alive := processes.family(mark):
            for process in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run.id).state.is_running(), "Prefect knew before"
        reconcile()
        closed, suspended = client.read_flow_run(run.id).state, client.read_flow_run(waits.id).state
        client.delete_flow_run(waits.id)
    local_services.up(quiet.home)
    assert closed.is_crashed()
    assert "process of this run is gone" in closed.message
    assert suspended.is_paused()
    assert not lock.exists()


def test_a_run_elsewhere_is_closed_only_after_it_fell_silent(quiet):
    """Three runs that Prefect calls running, without a lock here: heard just now, long ago, and never."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("merge-set/merge-set")
        new, old, never = (
            client.create_flow_run_from_deployment(
                deployment.id, state=Running(), parameters={"bundle": BUNDLE}
            )
            for _ in range(3)
        )
        for run, minutes in ((new, 1), (old, 20), (old, 40)):
            emit_event(
                "prefect.flow-run.heartbeat",
                {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
                occurred=datetime.now(UTC) - timedelta(minutes=minutes),
            )
        EventsWorker.drain_all()
        ids = [f"prefect.flow-run.{run.id}" for run in (new, old)]
        chosen = EventFilter.model_validate({"resource": {"id": ids}})
        heard = "prefect.flow-run.heartbeat"
        wait(
            lambda: [one.event for one in client.read_events(chosen, limit=50).events].count(heard) == 3,
            "the heartbeats arrived",
        )
        closed = close_dead_runs.fn(quiet.settings)
        states = [client.read_flow_run(run.id).state for run in (new, old, never)]
        for run in (new, old, never):
            client.delete_flow_run(run.id)
    assert closed == [old.name]
    assert [state.is_crashed() for state in states] == [False, True, False]


def test_retrain_trains_what_changed_and_nothing_else(quiet, tmp_path):
    """A new task, an unchanged one, and one whose rows changed."""
    encoder = tiny_tasks.make_encoder(tmp_path / "encoder")
    folder = quiet.home / "tasks"
    folder.mkdir()
    kept = [tiny_tasks.write_task(tmp_path / "files", name, encoder) for name in ("topic", "first")]
    for path in kept:
        (folder / path.name).symlink_to(path)
    first, again = retrain(), retrain()
    rows = tmp_path / "files" / "first-train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-3]))
    changed = retrain()
    assert first == {"trained": ["first", "topic"], "unchanged": []}
    assert again == {"trained": [], "unchanged": ["first", "topic"]}
    assert changed == {"trained": ["first"], "unchanged": ["topic"]}
    serving = AdapterRegistry(quiet.settings).serving(str(encoder))
    assert {task for _, task in serving} == {"first", "topic"}

    broken = yaml.safe_load(kept[0].read_text()) | {"metric": "rouge_l"}
    (folder / "broken.yaml").write_text(json.dumps(broken))
    with pytest.raises(Exception, match="metric"):
        retrain()
    (folder / "broken.yaml").unlink()
