"""Bundle descriptions: what a file may say, what the default is, and how mistakes are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydraopt.errors import TaskFileError
from infra.pipeline_spec import BundleSpec, desired_specs, load_specs

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def write(home: Path, file: str, text: str) -> Path:
    path = home / "bundles" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_two_keys_are_enough(tmp_path):
    spec = BundleSpec.load(write(tmp_path, "a.yaml", f"name: assist\nbase_model: {MODEL}\n"))
    assert spec.tasks is None
    assert spec.channel == "stable"
    assert spec.recipe.budget == 0.25
    assert spec.gates.max_storage_ratio == 0.25
    assert (spec.gates.max_task_drop_percent, spec.gates.max_mean_drop_percent) == (5, 1)
    assert spec.gates.min_samples == 50


@pytest.mark.parametrize(
    ("extra", "limit"),
    [
        ("recipe: {budget: 0.3}", 0.3),
        ("recipe: {budget: 0.3}\ngates: {min_samples: 10}", 0.3),
        ("recipe: {budget: 0.3}\ngates: {max_storage_ratio: 0.2}", 0.2),
        ("recipe: {max_error: 0.1}", 0.25),
    ],
)
def test_the_storage_gate_follows_the_budget_unless_given(tmp_path, extra, limit):
    spec = BundleSpec.load(write(tmp_path, "a.yaml", f"name: a\nbase_model: {MODEL}\n{extra}\n"))
    assert spec.gates.max_storage_ratio == limit


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("taks: [a]", "taks is not a known key"),
        ("tasks: []", "needs a task"),
        ("tasks: [a, b, a]", "named twice: a"),
        ("tasks: ['../up']", "not allowed"),
        ("tasks: a", "tasks"),
        ("channel: 'a/b'", "channel 'a/b' is not allowed"),
        ("recipe: {budget: 2}", "recipe.budget"),
        ("recipe: {budget: yes}", "recipe.budget"),
        ("recipe: {budget: 0.2, max_error: 0.1}", "exactly one"),
        ("gates: {max_strage_ratio: 1}", "gates.max_strage_ratio is not a known key"),
        ("name: b", "twice"),
    ],
)
def test_a_mistake_is_reported_with_file_and_key(tmp_path, line, hint):
    path = write(tmp_path, "a.yaml", f"name: a\nbase_model: {MODEL}\n{line}\n")
    with pytest.raises(TaskFileError, match=hint) as caught:
        load_specs(tmp_path)
    assert str(path) in str(caught.value)


def test_no_folder_is_no_specs(tmp_path):
    assert load_specs(tmp_path / "nothing") == ()


def test_only_yaml_files_are_read(tmp_path):
    write(tmp_path, "notes.txt", "not yaml: [")
    write(tmp_path, "b.yml", f"name: b\nbase_model: {MODEL}\n")
    write(tmp_path, "a.yaml", f"name: z\nbase_model: {MODEL}\n")
    assert [spec.name for spec in load_specs(tmp_path)] == ["b", "z"]


def test_one_name_twice_is_refused(tmp_path):
    write(tmp_path, "a.yaml", f"name: assist\nbase_model: {MODEL}\n")
    write(tmp_path, "b.yaml", "name: Assist\nbase_model: other\n")
    with pytest.raises(TaskFileError, match=r"b\.yaml.*already described by .*a\.yaml"):
        load_specs(tmp_path)


def test_a_base_model_without_a_file_gets_the_default(tmp_path):
    write(tmp_path, "a.yaml", "name: assist\nbase_model: org/described\n")
    specs = desired_specs(tmp_path, [MODEL, "org/described", MODEL])
    assert [(spec.name, spec.base_model) for spec in specs] == [
        ("all-minilm-l6-v2", MODEL),
        ("assist", "org/described"),
    ]


@pytest.mark.parametrize(
    ("base_model", "name"),
    [
        (MODEL, "all-minilm-l6-v2"),
        ("/models/Tiny T5/", "tiny-t5"),
        ("???", "bundle"),
        ("x" * 300, "x" * 100),
        ("o/enc..v2", "enc.v2"),
    ],
)
def test_the_default_name_is_always_allowed(base_model, name):
    assert BundleSpec.default(base_model).name == name


def test_defaults_never_share_a_name(tmp_path):
    with pytest.raises(TaskFileError, match=r"'here/model' and 'there/model' both lead to .* 'model'"):
        desired_specs(tmp_path, ["here/model", "there/model"])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{needed: 0}", "needed"),
        ("{needed: 3, approvers: [ana, bo]}", "only 2 may give one"),
        ("{approvers: [ana, Ana]}", "twice"),
        ("{approvers: [../ana]}", "not allowed"),
        ("{approvers: [ana], keys: {bo: x}}", "no approvers: bo"),
        ("{keys: {ana: x}}", "no public key"),
        ("{expires_days: .inf}", "expires_days"),
        ("{need: 2}", "not a known key"),
    ],
)
def test_a_policy_nobody_can_meet_is_refused(tmp_path, section, said):
    path = write(tmp_path, "a.yaml", f"name: a\nbase_model: {MODEL}\napproval: {section}\n")
    with pytest.raises(TaskFileError, match=said):
        BundleSpec.load(path)


def test_without_a_policy_one_trusted_person_is_enough(tmp_path):
    assert BundleSpec.load(write(tmp_path, "a.yaml", f"name: a\nbase_model: {MODEL}\n")).approval is None
