"""Whether a recorded measurement is of the job at hand."""

import pytest

pytest.importorskip("prefect")

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.result import EVALUATION_RULES, Evaluation
from hydraopt.evaluation.task_file import TaskFile
from infra.adapter_store import AdapterVersion
from tasks.jobs import Job, job_from_file, recorded_evaluation

ROWS = [{"text": "a pear", "label": "fruit"}, {"text": "some zinc", "label": "metal"}]
DEFINITION = {
    "name": "topic",
    "application": "sorting",
    "language": "en",
    "base_model": "org/model",
    "kind": "classification",
    "labels": ["fruit", "metal"],
}


def job(rows=ROWS, **changes) -> Job:
    return Job(TaskFile.from_definition({**DEFINITION, **changes}), rows)


def version_of(known: Job) -> AdapterVersion:
    measured = Evaluation(
        task="topic",
        metric="accuracy",
        value=0.5,
        low=0.1,
        high=0.9,
        samples=2,
        metrics={"accuracy": 0.5},
        data_digest=known.data_digest,
        rules=EVALUATION_RULES,
    )
    return AdapterVersion(
        task="topic",
        base_model="org/model",
        digest="ab" * 32,
        files={},
        reference_bytes=1,
        task_definition=known.task.definition(),
        own_evaluation=measured.model_dump(mode="json"),
        source="a test",
    )


def test_the_same_job_is_not_measured_again():
    assert recorded_evaluation(version_of(job()), job()).value == 0.5


@pytest.mark.parametrize("other", [job(rows=ROWS[:1]), job(max_length=64), job(metric="macro_f1")])
def test_other_rows_or_another_way_of_asking_is_another_measurement(other):
    assert recorded_evaluation(version_of(job()), other) is None


def test_what_was_measured_under_other_rules_is_measured_again():
    """Those of the first versions do not say under which."""
    old = version_of(job())
    del old.own_evaluation["rules"]
    assert recorded_evaluation(old, job()) is None


def test_a_version_that_was_never_measured_has_nothing_recorded():
    bare = version_of(job()).model_copy(update={"own_evaluation": None})
    assert recorded_evaluation(bare, job()) is None


def test_a_task_file_about_another_task_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a pear", "label": "fruit"}\n')
    path = tmp_path / "topic.yaml"
    path.write_text(
        "name: topic\napplication: a\nlanguage: en\nbase_model: org/model\nkind: classification\n"
        "labels: [fruit, metal]\ndata: {test: rows.jsonl}\n"
    )
    assert job_from_file(path, "topic").task.name == "topic"
    with pytest.raises(TaskFileError, match="'topic', not 'other'"):
        job_from_file(path, "other")
