"""Evaluation against models worked out by hand: merged weights, one row at a time, no padding, no PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import greedy_by_hand
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

import hydraopt
from hydraopt.base_models import load_base_model
from hydraopt.errors import AdapterFormatError, BundleError, HydraoptError, TaskFileError
from hydraopt.evaluation.encoding import IGNORED, prompt_ids, training_example
from hydraopt.evaluation.evaluate import (
    Evaluation,
    evaluate_adapter,
    evaluate_bundle,
    evaluate_bundle_tasks,
    evaluate_model,
)
from hydraopt.evaluation.predict import predict_labels, predict_texts
from hydraopt.evaluation.rows import rows_digest


def random_adapter(folder: Path, base: Path, task_type: str, *, seed: int, labels: int | None = None) -> Path:
    """An adapter with large random factors and a large random head, as PEFT saves it."""
    model, _ = load_base_model(str(base), None, task_type, labels)
    config = LoraConfig(task_type=task_type, r=3, lora_alpha=6, target_modules="all-linear")
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    tuned.save_pretrained(str(folder))
    return folder


def merged_by_hand(folder: Path, base: Path, task_type: str, labels: int | None = None) -> Any:
    """The base model with ``W + (6 / 3) B A`` written into its weights and the head replaced."""
    model, _ = load_base_model(str(base), None, task_type, labels)
    weights = model.state_dict()
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        place = name.removeprefix("base_model.model.")
        if place.endswith("lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")]
            weights[place.replace("lora_A.weight", "weight")] += 2 * up @ tensor
        elif "lora_B" not in place:
            weights[place].copy_(tensor)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(tmp_path_factory.mktemp("a") / "topic", tiny_encoder, "SEQ_CLS", seed=1, labels=3)


def labels_by_hand(task: Any, model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> list[str]:
    with torch.inference_mode():
        return [
            task.labels[int(model(**tokenizer(row["text"], return_tensors="pt")).logits[0].argmax())]
            for row in rows
        ]


def test_an_adapter_scores_what_its_weights_added_to_the_base_score(topic_task, adapter, tiny_encoder):
    task = topic_task()
    rows = task.read_rows("test")
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    guesses = labels_by_hand(task, merged_by_hand(adapter, tiny_encoder, "SEQ_CLS", 3), tokenizer, rows)
    right = [guess == row["label"] for guess, row in zip(guesses, rows, strict=True)]
    assert len(set(guesses)) > 1  # else any constant would do

    result = evaluate_adapter(task, adapter, device="cpu")

    assert result.value == sum(right) / len(rows)
    assert (result.task, result.metric, result.samples) == ("topic", "accuracy", 30)
    assert result.low <= result.value <= result.high
    assert result.metrics["accuracy"] == result.value
    assert result.metrics["without_output"] == 0
    assert result.data_digest == task.data_digest("test")


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_labels_do_not_depend_on_the_batch_size(topic_task, adapter, tiny_encoder, batch_size):
    task = topic_task()
    rows = task.read_rows("test")
    model = merged_by_hand(adapter, tiny_encoder, "SEQ_CLS", 3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    with torch.inference_mode():
        found = predict_labels(task, model, tokenizer, rows, batch_size=batch_size)
    assert found == labels_by_hand(task, model, tokenizer, rows)


def test_a_decoder_may_classify_too(topic_task, tiny_decoder, tmp_path):
    """It finds the last token by the padding token, which it shares with the end token."""
    folder = random_adapter(tmp_path / "d", tiny_decoder, "SEQ_CLS", seed=4, labels=3)
    task = topic_task(base_model=str(tiny_decoder))
    rows = task.read_rows("test")
    model = merged_by_hand(folder, tiny_decoder, "SEQ_CLS", 3)
    guesses = labels_by_hand(task, model, AutoTokenizer.from_pretrained(tiny_decoder), rows)
    value = sum(guess == row["label"] for guess, row in zip(guesses, rows, strict=True)) / len(rows)
    assert evaluate_adapter(task, folder, device="cpu", batch_size=8).value == value


def test_rows_may_be_given_and_limited(topic_task, adapter):
    task = topic_task()
    rows = task.read_rows("test")
    whole = evaluate_adapter(task, adapter, rows=rows, device="cpu")
    assert whole == evaluate_adapter(task, adapter, device="cpu")
    some = evaluate_adapter(task, adapter, device="cpu", limit=10)
    assert some.samples == 10
    assert some.data_digest == rows_digest(rows[::3])  # spread over the file, which may be sorted by label
    for wrong in ({"limit": 0}, {"batch_size": 0}, {"rows": [{"text": "a", "label": "nonsense"}]}):
        with pytest.raises(TaskFileError):
            evaluate_adapter(task, adapter, device="cpu", **wrong)


def test_progress_ends_with_all_rows(topic_task, adapter):
    seen: list[tuple[int, int, str]] = []
    evaluate_adapter(
        topic_task(), adapter, device="cpu", batch_size=8, progress=lambda *step: seen.append(step)
    )
    assert [done for done, _, _ in seen] == [8, 16, 24, 30]
    assert seen[-1] == (30, 30, "evaluate topic")


def edited(adapter: Path, folder: Path, *, config: dict[str, Any] | None = None, edit: Any = None) -> Path:
    shutil.copytree(adapter, folder)
    if config is not None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if edit is not None:
        tensors = load_file(folder / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_logits_that_are_not_finite_count_as_wrong(topic_task, adapter, tmp_path):
    """The arg-max of NaNs is an ordinary label number; believing it would score a broken model."""

    def poison(tensors):
        tensors["base_model.model.classifier.bias"][1] = float("nan")

    folder = edited(adapter, tmp_path / "nan", edit=poison)
    result = evaluate_adapter(topic_task(), folder, device="cpu")
    assert result.value == 0
    assert result.metrics["without_output"] == 1


def drop(*parts: str):
    def edit(tensors):
        for name in [name for name in tensors if all(part in name for part in parts)]:
            del tensors[name]

    return edit


@pytest.mark.parametrize(
    ("task_change", "config", "edit", "error", "words"),
    [
        ({}, {"base_model_name_or_path": "other/base"}, None, TaskFileError, "'other/base'.*tiny-encoder"),
        ({"revision": "v1"}, {"revision": "v2"}, None, TaskFileError, "'v2'.*'v1'"),
        (
            {},
            {"task_type": "CAUSAL_LM", "modules_to_save": ["classifier", "score"]},
            None,
            TaskFileError,
            "CAUSAL_LM",
        ),
        (
            {"labels": ["fruit", "metal", "colour", "more"]},
            None,
            None,
            TaskFileError,
            r"shape \[3\].*4 labels",
        ),
        ({}, None, drop("classifier"), AdapterFormatError, "classifier.*random"),
        ({}, None, drop("layer.1.", "lora_B"), AdapterFormatError, "no matching lora_B"),
        (
            {},
            {"megatron_config": {"x": 1}, "megatron_core": "os"},
            None,
            AdapterFormatError,
            "megatron_config",
        ),
    ],
)
def test_an_adapter_that_does_not_belong_to_the_task_is_refused(  # noqa: PLR0917
    topic_task, adapter, tmp_path, task_change, config, edit, error, words
):
    folder = edited(adapter, tmp_path / "x", config=config, edit=edit)
    with pytest.raises(error, match=words):
        evaluate_adapter(topic_task(**task_change), folder, device="cpu")


def test_an_adapter_without_all_its_target_layers_is_refused(topic_task, adapter, tmp_path):
    """PEFT only warns, and goes on with random A and zero B for what is missing."""
    folder = edited(adapter, tmp_path / "part", edit=drop("layer.1.output.dense"))
    with pytest.raises(AdapterFormatError, match="missing adapter keys"):
        evaluate_adapter(topic_task(), folder, device="cpu")


def test_layers_the_base_does_not_have_are_refused(topic_task, adapter, tmp_path):
    def rename(tensors):
        for name in [name for name in tensors if "layer.1." in name]:
            tensors[name.replace("layer.1.", "layer.9.")] = tensors.pop(name)

    folder = edited(adapter, tmp_path / "far", edit=rename)
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("layer.1.", "layer.9."))
    with pytest.raises(AdapterFormatError, match=r"layer\.9\..*no such layer"):
        evaluate_adapter(topic_task(), folder, device="cpu")


def test_pickled_weights_are_not_opened(topic_task, adapter, tmp_path):
    folder = edited(adapter, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match="pickled"):
        evaluate_adapter(topic_task(), folder, device="cpu")


def test_a_head_of_another_width_is_told(topic_task, adapter, tiny_encoder):
    model = merged_by_hand(adapter, tiny_encoder, "SEQ_CLS", 3)
    task = topic_task(labels=["fruit", "metal", "colour", "more"])
    with pytest.raises(TaskFileError, match=r"4 labels.*3 outputs"):
        evaluate_model(task, model, AutoTokenizer.from_pretrained(tiny_encoder), task.read_rows("test"))


@pytest.fixture
def two_tasks(topic_task, adapter, tiny_encoder, tmp_path):
    """Two tasks of one base with heads of different sizes, and their lossless bundle."""
    first = topic_task()
    labels = ["fruit", "metal", "colour", "odd", "even"]
    second = topic_task(name="wide", labels=labels)
    folders = {
        "topic": adapter,
        "wide": random_adapter(tmp_path / "wide", tiny_encoder, "SEQ_CLS", seed=9, labels=5),
    }
    bundle = hydraopt.merge(folders, budget=None, max_error=1e-7, dtype="float32", device="cpu")
    return [first, second], folders, bundle


def test_a_lossless_bundle_scores_what_the_adapters_score(two_tasks, tmp_path):
    tasks, folders, bundle = two_tasks
    own = {task.name: evaluate_adapter(task, folders[task.name], device="cpu") for task in tasks}
    assert len({evaluation.value for evaluation in own.values()}) == 2  # so a mix-up of tasks would show

    assert evaluate_bundle_tasks(tasks, bundle, device="cpu") == own

    folder = bundle.save(tmp_path / "bundle") or tmp_path / "bundle"
    assert evaluate_bundle(tasks[1], folder, device="cpu", batch_size=3) == own["wide"]
    rows = tasks[0].read_rows("test")[:4]
    assert evaluate_bundle(tasks[0], folder, rows=rows, device="cpu").samples == 4


def test_a_bundle_of_other_tasks_or_another_base_is_refused(two_tasks, topic_task, tiny_decoder, tmp_path):
    _, _, bundle = two_tasks
    with pytest.raises(TaskFileError, match="no task 'third'; it has topic, wide"):
        evaluate_bundle(topic_task(name="third"), bundle, device="cpu")
    with pytest.raises(TaskFileError, match="tiny-decoder"):
        evaluate_bundle(topic_task(base_model=str(tiny_decoder)), bundle, device="cpu")
    with pytest.raises(HydraoptError):
        evaluate_bundle(topic_task(), tmp_path / "nothing", device="cpu")
    assert evaluate_bundle_tasks([], bundle) == {}
    assert issubclass(BundleError, HydraoptError)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_a_decoder_answers_greedily_whatever_the_batch(echo_task, tiny_decoder, tmp_path, batch_size):
    folder = random_adapter(tmp_path / "gen", tiny_decoder, "CAUSAL_LM", seed=2)
    task = echo_task(tiny_decoder)
    model = merged_by_hand(folder, tiny_decoder, "CAUSAL_LM")
    # What many instruction-tuned models ship with; greedy decoding must not follow it.
    model.generation_config.update(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    rows = task.read_rows("test")
    expected = []
    for row in rows:
        ids = tokenizer(f"the {row['input']} is")["input_ids"]
        answer = greedy_by_hand(model, ids, 4, tokenizer.eos_token_id)
        expected.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1

    tokenizer.pad_token = tokenizer.eos_token
    with torch.inference_mode():
        assert predict_texts(task, model, tokenizer, rows, batch_size=batch_size) == expected
    if batch_size == 5:
        result = evaluate_adapter(task, folder, device="cpu", batch_size=5)
        hits = [answer == row["target"] for answer, row in zip(expected, rows, strict=True)]
        assert result.value == sum(hits) / len(rows)
        assert set(result.metrics) == {"exact_match", "rouge_l", "without_output"}


def test_an_encoder_decoder_answers_greedily(echo_task, tiny_seq2seq, tmp_path):
    folder = random_adapter(tmp_path / "s2s", tiny_seq2seq, "SEQ_2_SEQ_LM", seed=3)
    task = echo_task(tiny_seq2seq)
    model = merged_by_hand(folder, tiny_seq2seq, "SEQ_2_SEQ_LM")
    tokenizer = AutoTokenizer.from_pretrained(tiny_seq2seq)
    rows = task.read_rows("test")
    expected = []
    for row in rows:
        ids = torch.tensor([tokenizer(f"the {row['input']} is")["input_ids"]])
        answer = [tokenizer.pad_token_id]
        with torch.inference_mode():
            while len(answer) < 5 and tokenizer.eos_token_id not in answer:
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([answer])).logits
                answer.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(answer, skip_special_tokens=True).strip())

    with torch.inference_mode():
        assert predict_texts(task, model, tokenizer, rows, batch_size=5) == expected
    assert isinstance(evaluate_adapter(task, folder, device="cpu"), Evaluation)


def test_answers_after_a_nan_do_not_count(echo_task, tiny_decoder):
    task = echo_task(tiny_decoder)
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    tokenizer.pad_token = tokenizer.eos_token
    rows = task.read_rows("test")
    word = tokenizer.convert_tokens_to_ids(rows[0]["target"])
    with torch.no_grad():
        model.model.embed_tokens.weight[word] = float("nan")  # only rows with this word are affected
    with torch.inference_mode():
        found = predict_texts(task, model, tokenizer, rows, batch_size=4)
    assert [answer is None for answer in found] == [row["target"] == rows[0]["target"] for row in rows]


def test_a_long_input_is_cut_but_the_instruction_after_it_stays(tiny_decoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    ids = prompt_ids(tokenizer, "the {input} is red", "apple " * 50, 12, decoder=True)
    assert len(ids) <= 12
    words = tokenizer.decode(ids, skip_special_tokens=True).split()
    assert (words[0], words[-2:]) == ("the", ["is", "red"])
    assert words.count("apple") > 5


def test_other_braces_in_a_prompt_are_left_alone(tiny_decoder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    assert prompt_ids(tokenizer, "{input}", "{a} {0}", 32, decoder=True) == tokenizer("{a} {0}")["input_ids"]


def test_only_the_answer_and_its_end_are_learnt(tiny_decoder, tiny_seq2seq):
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    settings = {"limit": 32, "answer_limit": 8}
    example = training_example(tokenizer, "the {input} is", "apple", "red", start=(), **settings)
    prompt = tokenizer("the apple is")["input_ids"]
    red = tokenizer.convert_tokens_to_ids("red")
    assert example["input_ids"] == [*prompt, red, tokenizer.eos_token_id]
    assert example["labels"] == [IGNORED] * len(prompt) + [red, tokenizer.eos_token_id]

    tokenizer = AutoTokenizer.from_pretrained(tiny_seq2seq)
    example = training_example(tokenizer, "the {input} is", "apple", "red", start=(0,), **settings)
    assert example["input_ids"] == tokenizer("the apple is")["input_ids"]
    assert example["labels"] == [red, tokenizer.eos_token_id]
    assert example["decoder_input_ids"] == [0, red]
    example = training_example(tokenizer, "the {input} is", "apple", "red", start=(0, 9), **settings)
    assert example["labels"] == [9, red, tokenizer.eos_token_id]
    assert example["decoder_input_ids"] == [0, 9, red]
    assert AutoModelForSeq2SeqLM.from_pretrained(tiny_seq2seq).config.is_encoder_decoder
