"""The demo's rows: enough of them, labelled as their task says, and no test row that was trained on."""

from collections import Counter
from pathlib import Path

import pytest

from hydraopt.evaluation.task_file import TaskFile

pytest.importorskip("prefect")
from flows.demo import material

DEMO = Path(__file__).parents[2] / "flows" / "demo"
TASK_FILES = sorted((DEMO / "tasks").glob("*.yaml"))
SPLITS = {"train": 200, "test": 100}  # fewer rows would make accuracy a matter of luck


def normalised(text):
    """Lower case, every other character than letters and digits a space, single spaces."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


@pytest.fixture(scope="module", params=TASK_FILES, ids=lambda path: path.stem)
def task(request):
    return TaskFile.load(request.param)


@pytest.fixture(scope="module")
def rows(task):
    return {split: task.read_rows(split) for split in SPLITS}


def test_normalising_ignores_case_punctuation_and_spaces():
    assert (
        normalised("  Is flight 882  ON time?!")
        == normalised("is flight-882 on time")
        == "is flight 882 on time"
    )


def test_the_update_is_made_to_the_task_that_is_meant():
    """A name that no task file has would silently update another task."""
    assert material.task_to_update().stem == material._UPDATED


def test_there_are_at_least_six_tasks_and_no_orphaned_data():
    assert len(TASK_FILES) >= 6
    assert {path.stem for path in TASK_FILES} == {
        path.name for path in (DEMO / "data").iterdir() if path.is_dir()
    }


def test_all_tasks_share_what_merging_needs():
    """One base model, and one start: adapters drawn from different A merge badly."""
    tasks = [TaskFile.load(path) for path in TASK_FILES]
    assert len({(task.base_model, task.lora) for task in tasks}) == 1


def test_the_file_is_named_after_its_task(task):
    assert (DEMO / "tasks" / f"{task.name}.yaml").is_file()
    assert task.data.train == Path(f"../data/{task.name}/train.jsonl")
    assert task.data.test == Path(f"../data/{task.name}/test.jsonl")


def test_enough_rows(rows):
    assert {split: len(rows[split]) >= least for split, least in SPLITS.items()} == dict.fromkeys(
        SPLITS, True
    )


def test_every_label_is_learnt_and_tested(task, rows):
    """A label with a handful of rows would neither be learnt nor measured."""
    assert len(task.labels) >= 6
    for split, least in (("train", 20), ("test", 10)):
        count = Counter(row["label"] for row in rows[split])
        assert set(count) == set(task.labels)
        assert min(count.values()) >= least


def test_no_row_stands_twice(rows):
    for split in SPLITS:
        texts = Counter(normalised(row["text"]) for row in rows[split])
        assert [text for text, times in texts.items() if times > 1] == []


def test_no_test_row_was_trained_on(rows):
    trained = {normalised(row["text"]) for row in rows["train"]}
    assert [row["text"] for row in rows["test"] if normalised(row["text"]) in trained] == []


def test_test_rows_are_no_templates_of_train_rows(rows):
    """A test row that differs from a train row of its label by a word would measure memory."""
    trained = [(row["label"], set(normalised(row["text"]).split())) for row in rows["train"]]
    close = [
        row["text"]
        for row in rows["test"]
        for label, words in trained
        if label == row["label"] and _overlap(words, set(normalised(row["text"]).split())) > 0.75
    ]
    assert close == []


def _overlap(one, other):
    return len(one & other) / len(one | other)
