"""When a task is tried again, and who hears of its progress."""

import pytest

pytest.importorskip("prefect")

from prefect.states import Failed
from prefect.utilities.collections import visit_collection

from hydraopt.errors import BudgetError, DeniedError, ServiceError
from infra.pipeline_spec import BundleSpec
from tasks.verb import _is_service_error, progress, reporting, verb


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ServiceError("down"), True),
        (DeniedError("no"), False),
        (BudgetError("too small"), False),
        (KeyError("bug"), False),
    ],
)
def test_only_a_failed_server_is_asked_again(error, again):
    """Bad input fails the same way each time, and a bug too."""
    assert _is_service_error(None, None, Failed(data=error)) is again


def test_prefect_can_walk_through_what_a_bundle_file_says():
    """It calls dict() on a task's arguments; a field named `keys` would be taken for a mapping's method."""
    spec = BundleSpec.model_validate({"name": "a", "base_model": "b", "approval": {"needed": 1}})
    found: set[str] = set()
    visit_collection(spec, lambda part: found.add(type(part).__name__), return_data=False)
    assert {"BundleSpec", "ApprovalPolicy", "GateRules", "Recipe"} <= found


def test_nothing_is_cached_by_prefect():
    """The object store knows what is done; a second memory could disagree with it."""
    from prefect.cache_policies import NO_CACHE

    @verb()
    def nothing() -> None:
        """Do nothing."""

    assert nothing.cache_policy == NO_CACHE
    assert nothing.retries == 2


def test_progress_reaches_the_one_who_listens_and_nobody_else():
    heard = []
    progress(1, 2, "before")
    with reporting(lambda *step: heard.append(step)):
        progress(1, 2, "during")
    progress(2, 2, "after")
    assert heard == [(1, 2, "during")]
