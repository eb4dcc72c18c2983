"""What a failed run in another process looks like in this one."""

import pytest

pytest.importorskip("prefect")

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingConcurrencySlot, Completed, Crashed, Failed, Late, Running, Scheduled
from prefect.testing.utilities import prefect_test_harness

from flows.deployed_run import _are_all_busy, _nobody_came, _raise_failure
from flows.deployments import PROCESSES
from hydraopt.errors import BudgetError, RefusedError, ServiceError


def run(state) -> FlowRun:
    return FlowRun.model_construct(name="calm-otter", state=state)


@pytest.mark.parametrize(
    ("message", "kind", "shown"),
    [
        ("Flow run encountered an exception: BudgetError: budget 0.01 is too small", BudgetError, "0.01"),
        ("Flow run encountered an exception: RefusedError: no: really", RefusedError, "no: really"),
        ("Flow run encountered an exception: KeyError: 'x'", RuntimeError, "KeyError"),
        ("Flow run encountered an exception: OSError: disk full", RuntimeError, "disk full"),
        (None, RuntimeError, "calm-otter"),
    ],
)
def test_an_error_keeps_its_kind_and_message(message, kind, shown):
    with pytest.raises(kind, match=shown):
        _raise_failure("merge-set", run(Failed(message=message)))


def test_a_crash_is_a_service_error_that_says_to_run_again():
    with pytest.raises(ServiceError, match="run it again"):
        _raise_failure("merge-set", run(Crashed(message="killed")))


def test_a_completed_run_raises_nothing():
    _raise_failure("merge-set", run(Completed()))


def test_waiting_for_another_run_is_not_waiting_for_a_runner():
    assert _nobody_came(run(Scheduled()))
    assert _nobody_came(run(Late()))
    assert not _nobody_came(run(AwaitingConcurrencySlot()))


def test_a_runner_whose_processes_are_all_taken_is_not_missing():
    """A real server: only runs of deployments under way count, not those of this process or those that ended."""

    @flow
    def work():
        pass

    with prefect_test_harness(), get_client(sync_client=True) as client:
        deployment = client.create_deployment(flow_id=client.create_flow(work), name="work")
        runs = [client.create_flow_run_from_deployment(deployment) for _ in range(PROCESSES)]
        client.create_flow_run(work, state=Running())
        for run in runs:
            assert not _are_all_busy(client)
            client.set_flow_run_state(run.id, Running(), force=True)
        assert _are_all_busy(client)
        client.set_flow_run_state(runs[0].id, Completed(), force=True)
        assert not _are_all_busy(client)
