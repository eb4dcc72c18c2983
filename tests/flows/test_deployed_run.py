"""What a failed run in another process looks like in this one."""

import pytest

pytest.importorskip("prefect")

from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingConcurrencySlot, Completed, Crashed, Failed, Late, Scheduled

from flows.deployed_run import _nobody_came, _raise_failure
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
