"""Task files and their rows: what is accepted, what is refused and how, and what identifies the data."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pytest
import yaml

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.rows import read_json_lines, rows_digest, rows_to_bytes
from hydraopt.evaluation.task_file import TaskFile

CLASSIFICATION = {
    "name": "support",
    "application": "intent classification",
    "language": "en",
    "base_model": "somebody/encoder",
    "kind": "classification",
    "labels": ["refund", "delivery"],
    "data": {"train": "train.jsonl", "test": "test.jsonl"},
}
GENERATION = {
    "name": "summarise-de",
    "application": "summaries",
    "language": "de",
    "base_model": "somebody/decoder",
    "kind": "generation",
    "prompt": "Fasse zusammen: {input}\n{style}",
    "data": {"test": "test.jsonl"},
}
ROWS = [{"text": "where is it?", "label": "delivery"}, {"text": "money back", "label": "refund"}]


def write(folder: Path, values: object, name: str = "task.yaml") -> Path:
    path = folder / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


def lines(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def load(folder: Path, **changes: object) -> TaskFile:
    return TaskFile.load(write(folder, CLASSIFICATION | changes))


def test_a_minimal_file_gets_sensible_defaults(tmp_path):
    task = load(tmp_path)
    assert (task.metric, task.lora.target_modules, task.revision) == ("accuracy", "all-linear", None)
    generation = TaskFile.load(write(tmp_path, GENERATION | {"lora": {"r": 8}, "training": {"epochs": 7}}))
    assert (generation.metric, generation.max_length) == ("rouge_l", 512)
    assert (generation.lora.r, generation.lora.alpha) == (8, 32)
    assert (generation.training.epochs, generation.training.learning_rate) == (7, 2e-4)
    assert task.training.learning_rate == 1e-3


def test_what_a_generation_task_says_itself_is_no_default(tmp_path):
    task = TaskFile.load(write(tmp_path, GENERATION | {"max_length": 64, "metric": "exact_match"}))
    assert (task.max_length, task.metric) == (64, "exact_match")


def test_data_is_found_relative_to_the_task_file(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", lines(*ROWS), "t.jsonl")
    monkeypatch.chdir("/")
    task = load(tmp_path / "tasks", data={"test": "../data/t.jsonl"})
    assert task.read_rows("test") == ROWS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metric": "rouge_l"}, ["metric 'rouge_l'", "accuracy or macro_f1"]),
        ({"labels": ["refund"]}, ["at least 2 labels", "got 1"]),
        ({"labels": ["refund", "delivery", "refund"]}, ["twice", "refund"]),
        ({"labels": ["refund", True]}, ["labels.1", "True", "quotes"]),
        ({"language": False}, ["language", "False", "quotes"]),
        ({"language": "English please"}, ["language", "English please"]),
        ({"name": "../up"}, ["'../up'", "not allowed"]),
        ({"kind": "regression"}, ["kind", "regression"]),
        ({"lora": {"r": 0}}, ["lora.r", "found 0"]),
        ({"lora": {"r": True}}, ["lora.r", "expected a number", "True"]),
        ({"training": {"learning_rate": True}}, ["training.learning_rate", "expected a number", "True"]),
        ({"lora": {"rank": 4}}, ["lora.rank", "not a known key"]),
        ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "nan"]),
        ({"training": {"epochs": 2.5}}, ["training.epochs", "2.5"]),
        ({"data": {"train": "a.jsonl"}}, ["data.test is missing"]),
        ({"data": {"test": "a.jsonl", "hub": {"name": "x/y"}}}, ["hub or files", "test"]),
        ({"colour": "blue"}, ["colour is not a known key"]),
    ],
)
def test_a_wrong_value_is_told_with_file_field_and_value(tmp_path, change, words):
    with pytest.raises(TaskFileError) as caught:
        load(tmp_path, **change)
    assert all(word in str(caught.value) for word in [*words, str(tmp_path / "task.yaml")]), caught.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "Say it again"}, ["{input}", "Say it again"]),
        ({"labels": ["a", "b"]}, ["labels are for classification"]),
    ],
)
def test_a_generation_task_needs_a_prompt_and_no_labels(tmp_path, change, words):
    with pytest.raises(TaskFileError) as caught:
        TaskFile.load(write(tmp_path, GENERATION | change))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not YAML"),
        ("- just\n- a list\n", "found list"),
        ("", "found NoneType"),
        ("name: a\nname: b\n", "'name' stands twice"),
        ("data: {test: a, test: b}\n", "'test' stands twice"),
        ("!!python/object/apply:os.system ['true']\n", "not YAML"),
        ("[" * 20_000, "not YAML"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, words):
    with pytest.raises(TaskFileError, match=words):
        TaskFile.load(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TaskFileError, match=r"nothing\.yaml: cannot be read"):
        TaskFile.load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lines(*ROWS) + "{oops}\n", "line 3: not JSON"),
        (lines(*ROWS) + "\n\n[1, 2]\n", "line 5: expected a JSON object, found list"),
        (lines(ROWS[0], {"label": "refund"}), "line 2: field 'text' is missing"),
        (lines(ROWS[0], {"text": "a"}), "line 2: field 'label' is missing"),
        (lines({"text": " \n", "label": "refund"}), "line 1: 'text' is empty"),
        (lines({"text": 7, "label": "refund"}), "line 1: 'text' is 7"),
        (lines({"text": None, "label": "refund"}), "line 1: 'text' is None"),
        (lines({"text": "a", "label": "return"}), "line 1: label 'return' is not among"),
        (lines({"text": "a", "label": 1}), "line 1: 'label' is 1"),
        (lines({"text": "a" * 200_001, "label": "refund"}), "line 1: 'text' has 200,001 characters"),
        ('{"text": "\\ud800", "label": "refund"}\n', "line 1: not JSON"),
        ("\n \n", "its test data holds no rows"),
        ("", "its test data holds no rows"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(tmp_path, text, words):
    write(tmp_path, text, "test.jsonl")
    with pytest.raises(TaskFileError, match=words):
        load(tmp_path).read_rows("test")


def test_a_table_is_told_from_json_lines(tmp_path):
    (tmp_path / "test.jsonl").write_text("text,label\na,refund\n")
    with pytest.raises(TaskFileError, match=r"JSON lines.*line 1: not JSON"):
        load(tmp_path).read_rows("test")


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "test.jsonl").write_text(lines(*ROWS), encoding="utf-8-sig")
    assert load(tmp_path).read_rows("test") == ROWS


def test_files_that_cannot_be_read_are_named(tmp_path):
    task = load(tmp_path, data={"train": "train.jsonl.gz", "test": "test.jsonl"})
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "caf\xe9", "label": "refund"}\n')
    with pytest.raises(TaskFileError, match="not UTF-8"):
        task.read_rows("test")
    with pytest.raises(TaskFileError, match=r"train\.jsonl\.gz: cannot be read"):
        task.read_rows("train")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS).encode() * 100)[:-20])
    with pytest.raises(TaskFileError, match=r"train\.jsonl\.gz: cannot be read"):
        task.read_rows("train")
    with pytest.raises(TaskFileError, match="no validation data"):
        task.read_rows("validation")


def test_texts_that_look_like_dates_or_numbers_stay_texts(tmp_path):
    """Arrow's type inference would read both columns as something else."""
    rows = [{"text": "2020-01-01", "label": "1"}, {"text": "2021-02-03", "label": "2"}]
    write(tmp_path, lines(*rows), "test.jsonl")
    assert load(tmp_path, labels=["1", "2"]).read_rows("test") == rows


def test_equal_rows_have_one_digest_wherever_they_are_kept(tmp_path):
    write(
        tmp_path,
        "\n" + lines(*({"label": r["label"], "id": 4, "text": r["text"]} for r in ROWS)),
        "test.jsonl",
    )
    (tmp_path / "test.jsonl.gz").write_bytes(
        gzip.compress(lines(*({"q": r["text"], "a": r["label"]} for r in ROWS)).encode())
    )
    plain = load(tmp_path)
    packed = load(tmp_path, data={"test": "test.jsonl.gz", "text": "q", "label": "a"})

    canonical = b'{"label":"delivery","text":"where is it?"}\n{"label":"refund","text":"money back"}\n'
    assert plain.data_digest("test") == packed.data_digest("test") == hashlib.sha256(canonical).hexdigest()
    assert rows_digest(ROWS[::-1]) != rows_digest(ROWS)


def test_canonical_bytes_give_the_rows_back(tmp_path):
    rows = [{"text": 'नमस्ते\n\u2028"quoted"', "label": "x"}]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(rows_to_bytes(rows))
    assert [row for _, row in read_json_lines(file)] == rows


def test_canonical_bytes_are_text_with_sorted_keys_and_no_spaces():
    rows = [{"text": "naïve 雪", "label": "x"}, {"text": "b", "label": "y"}]
    expected = '{"label":"x","text":"naïve 雪"}\n{"label":"y","text":"b"}\n'
    assert rows_to_bytes(rows) == expected.encode()


def test_several_references_are_kept_without_repeats(tmp_path):
    write(
        tmp_path,
        lines(
            {"input": "a", "target": "x"},
            {"input": "b", "target": "x", "targets": ["x", "y", "x"]},
            {"input": "c", "target": ["p", "q"]},
            {"input": "d", "target": "x", "targets": None},
            {"input": "e", "targets": ["only"]},
        ),
        "test.jsonl",
    )
    assert TaskFile.load(write(tmp_path, GENERATION)).read_rows("test") == [
        {"input": "a", "target": "x"},
        {"input": "b", "target": "x", "targets": ["x", "y"]},
        {"input": "c", "target": "p", "targets": ["p", "q"]},
        {"input": "d", "target": "x"},
        {"input": "e", "target": "only"},
    ]


@pytest.mark.parametrize(
    "wrong", [{"input": "a", "targets": []}, {"input": "a", "targets": "x"}, {"input": "a"}]
)
def test_a_row_without_a_right_answer_is_refused(tmp_path, wrong):
    write(tmp_path, lines(wrong), "test.jsonl")
    with pytest.raises(TaskFileError, match="line 1"):
        TaskFile.load(write(tmp_path, GENERATION)).read_rows("test")


def test_a_definition_says_all_but_where_the_files_are(tmp_path):
    first = load(tmp_path, lora={"r": 8, "target_modules": ["query", "value"]})
    second = TaskFile.load(
        write(
            tmp_path,
            CLASSIFICATION
            | {
                "lora": {"target_modules": ["query", "value"], "r": 8},
                "data": {"test": "/elsewhere/x.jsonl.gz"},
            },
            "other.yaml",
        )
    )
    assert first.definition() == second.definition()
    assert str(tmp_path) not in json.dumps(first.definition())
    rebuilt = TaskFile.from_definition(json.loads(json.dumps(first.definition())))
    assert rebuilt.definition() == first.definition()
    assert rebuilt.check_rows(ROWS) == ROWS
    with pytest.raises(TaskFileError, match="no test data"):
        rebuilt.read_rows("test")
    assert load(tmp_path, lora={"r": 9}).definition() != first.definition()


def test_a_stored_definition_that_is_none_is_refused():
    with pytest.raises(TaskFileError, match="stored task definition"):
        TaskFile.from_definition({"name": "x"})


def test_rows_from_elsewhere_are_checked_too(tmp_path):
    task = load(tmp_path)
    with pytest.raises(TaskFileError, match="row 1: label 'other'"):
        task.check_rows([ROWS[0], {"text": "a", "label": "other"}])
    with pytest.raises(TaskFileError, match="no rows"):
        task.check_rows([])


def test_a_task_survives_pickling_with_its_folder(tmp_path):
    import pickle

    write(tmp_path, lines(*ROWS), "test.jsonl")
    assert pickle.loads(pickle.dumps(load(tmp_path))).read_rows("test") == ROWS


def test_a_data_set_gives_class_names_for_class_numbers(tmp_path):
    features = datasets.Features(
        {"utterance": datasets.Value("string"), "intent": datasets.ClassLabel(names=["refund", "delivery"])}
    )
    data = datasets.Dataset.from_dict({"utterance": ["a", "b"], "intent": [1, 0]}, features=features)
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "test.parquet")
    task = load(
        tmp_path,
        data={"hub": {"name": str(tmp_path / "set"), "train": None}, "text": "utterance", "label": "intent"},
    )
    assert task.read_rows("test") == [
        {"text": "a", "label": "delivery"},
        {"text": "b", "label": "refund"},
    ]
    assert task.definition()["data"]["hub"]["name"] == str(tmp_path / "set")
    with pytest.raises(TaskFileError, match="no train data"):
        task.read_rows("train")


def test_rows_without_a_label_in_a_data_set_are_told(tmp_path):
    """Test splits of competitions say -1."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["refund", "delivery"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "test.parquet")
    task = load(tmp_path, data={"hub": {"name": str(tmp_path / "set")}})
    with pytest.raises(TaskFileError, match=r"split 'test', row 1: 'label' is -1.*0 to 1.*another split"):
        task.read_rows("test")


def test_a_row_whose_class_is_missing_is_told(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["refund", "delivery"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, None]}, features=features)
    (tmp_path / "set").mkdir()
    data.to_parquet(tmp_path / "set" / "test.parquet")
    task = load(tmp_path, data={"hub": {"name": str(tmp_path / "set")}})
    with pytest.raises(TaskFileError, match=r"row 1: 'label' is None; expected text"):
        task.read_rows("test")


def test_a_data_set_is_read_in_the_configuration_and_revision_that_are_named(tmp_path, monkeypatch):
    asked = {}

    def hub(name, config, *, revision, split):
        asked.update(name=name, config=config, revision=revision, split=split)
        return datasets.Dataset.from_dict({"text": ["a"], "label": ["refund"]})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    source = {"name": "somebody/set", "config": "de", "revision": "v2", "test": "heldout"}
    assert load(tmp_path, data={"hub": source}).read_rows("test") == [{"text": "a", "label": "refund"}]
    assert asked == {"name": "somebody/set", "config": "de", "revision": "v2", "split": "heldout"}


def test_a_data_set_that_cannot_be_loaded_is_named(tmp_path):
    (tmp_path / "nothing-inside").mkdir()
    task = load(tmp_path, data={"hub": {"name": str(tmp_path / "nothing-inside")}})
    with pytest.raises(TaskFileError, match=r"nothing-inside.*split 'test' cannot be loaded"):
        task.read_rows("test")
