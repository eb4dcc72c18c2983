"""When a candidate is measured again."""

import pytest

pytest.importorskip("prefect")

from hydraopt.evaluation.result import Evaluation
from tasks.candidates import _is_stale


def measured(rows: str = "a", metric: str = "accuracy") -> Evaluation:
    return Evaluation(
        task="t",
        metric=metric,
        value=0.5,
        low=0.1,
        high=0.9,
        samples=2,
        metrics={metric: 0.5},
        data_digest=rows * 64,
    )


WANTED = measured().model_dump(mode="json")


@pytest.mark.parametrize(
    ("wanted", "own", "merged", "stale"),
    [
        (WANTED, measured(), measured(), False),
        (WANTED, None, measured(), True),
        (WANTED, measured(), None, True),
        (WANTED, measured("b"), measured("b"), True),
        (WANTED, measured(), measured(metric="macro_f1"), True),
        (None, None, None, False),
    ],
)
def test_measured_again_when_rows_appeared_or_changed(wanted, own, merged, stale):
    """A task without rows stays unmeasured: the gates say no, and nothing runs in a circle."""
    assert _is_stale(wanted, own, merged) is stale
