"""Adapters of every kind on their tasks, alone and in a bundle of several kinds: as one row at a time says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny_models import greedy_by_hand, save_model, word_tokenizer
from tokenizers import normalizers
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GenerationConfig,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    XmodConfig,
    XmodModel,
)

import hydraopt
from hydraopt.base_models import load_base, load_base_model
from hydraopt.errors import AdapterFormatError, BundleError, TaskFileError
from hydraopt.evaluation.encoding import answer_start, encoded_rows, input_limit, training_example
from hydraopt.evaluation.evaluate import evaluate_adapter, evaluate_bundle_tasks
from hydraopt.evaluation.predict import predict_labels, predict_texts

CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lambda kind: LoraConfig(task_type=kind, r=3, target_modules="all-linear"),
    "vera": lambda kind: VeraConfig(
        task_type=kind, r=4, projection_prng_key=5, target_modules=["query", "q_proj"]
    ),
    "prompt": lambda kind: PromptTuningConfig(task_type=kind, num_virtual_tokens=5),
    "prefix": lambda kind: PrefixTuningConfig(task_type=kind, num_virtual_tokens=4),
}


def trained(folder: Path, base: Path, kind: str, config: Any, labels: int | None = None) -> Path:
    """An adapter of random numbers, saved by PEFT."""
    model, _ = load_base_model(str(base), None, kind, labels)
    tuned = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(tuned.named_parameters()):
            if parameter.requires_grad or "vera_lambda" in name:
                scale = 0.0 if name.endswith("bias") else 0.5  # else a classifier gives one label only
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    tuned.save_pretrained(str(folder))
    return folder


def by_hand(folder: Path, base: Path, kind: str, labels: int | None = None) -> tuple[Any, Any]:
    model, tokenizer = load_base_model(str(base), None, kind, labels)
    return PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_of_any_kind_is_measured(topic_task, tiny_encoder, tmp_path, name):
    folder = trained(tmp_path / "a", tiny_encoder, "SEQ_CLS", CONFIGS[name]("SEQ_CLS"), 3)
    task = topic_task()
    rows = task.read_rows("test")
    model, tokenizer = by_hand(folder, tiny_encoder, "SEQ_CLS", 3)
    with torch.inference_mode():
        guesses = [
            task.labels[int(model(**tokenizer(row["text"], return_tensors="pt")).logits[0].argmax())]
            for row in rows
        ]
    assert len(set(guesses)) > 1  # else any constant would do
    right = [guess == row["label"] for guess, row in zip(guesses, rows, strict=True)]
    assert evaluate_adapter(task, folder, device="cpu").value == sum(right) / len(rows)
    with torch.inference_mode():
        for size in (1, 7):
            assert predict_labels(task, model, tokenizer, rows, batch_size=size) == guesses


@pytest.mark.parametrize("name", CONFIGS)
def test_a_generator_of_any_kind_answers_whatever_the_batch(echo_task, tiny_decoder, tmp_path, name):
    """Padding between virtual tokens and a prompt would move the prompt."""
    folder = trained(tmp_path / "a", tiny_decoder, "CAUSAL_LM", CONFIGS[name]("CAUSAL_LM"))
    task = echo_task(tiny_decoder)
    rows = task.read_rows("test")
    model, tokenizer = by_hand(folder, tiny_decoder, "CAUSAL_LM")
    expected = []
    for row in rows:
        ids = tokenizer(f"the {row['input']} is")["input_ids"]
        answer = greedy_by_hand(model, ids, 4, tokenizer.eos_token_id)
        expected.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    assert len(set(expected)) > 1
    with torch.inference_mode():
        for size in (1, 5, 64):
            assert predict_texts(task, model, tokenizer, rows, batch_size=size) == expected
    assert evaluate_adapter(task, folder, device="cpu").samples == len(rows)


def test_tasks_of_several_kinds_are_measured_from_one_bundle(topic_task, echo_task, tiny_decoder, tmp_path):
    """A model holds one kind of adapter and one kind of task, so each gets its own."""
    named = {
        "labels": (topic_task, "SEQ_CLS", "lora"),
        "vectors": (topic_task, "SEQ_CLS", "vera"),
        "tokens": (topic_task, "SEQ_CLS", "prompt"),
        "words": (echo_task, "CAUSAL_LM", "lora"),
        "prefix": (echo_task, "CAUSAL_LM", "prefix"),
    }
    tasks, folders, own = [], {}, {}
    for name, (make, kind, config) in named.items():
        base = {"base_model": str(tiny_decoder)} if make is topic_task else {}
        task = make(name=name, **base) if base else make(tiny_decoder, name=name)
        rows = task.read_rows("test")
        folders[name] = trained(
            tmp_path / name, tiny_decoder, kind, CONFIGS[config](kind), len(task.labels) or None
        )
        own[name] = evaluate_adapter(task, folders[name], rows=rows, device="cpu")
        tasks.append((task, rows))
    bundle = hydraopt.merge(folders, budget=None, max_error=1e-7, dtype="float32", device="cpu")
    given = {task.name: rows for task, rows in tasks}
    assert evaluate_bundle_tasks([task for task, _ in tasks], bundle, rows=given, device="cpu") == own
    # A model per label would pass this, too, if all scores were equal.
    assert len({evaluation.value for evaluation in own.values()}) > 2


def test_tasks_that_exclude_one_another_are_measured_one_by_one(echo_task, tiny_decoder, tmp_path):
    """One replaces a layer whole that another updates."""
    whole = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    update = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    folders, own, tasks = {}, {}, []
    for name, config in (("whole", whole), ("part", update)):
        folders[name] = trained(tmp_path / name, tiny_decoder, "CAUSAL_LM", config)
        tasks.append(echo_task(tiny_decoder, name=name))
        own[name] = evaluate_adapter(tasks[-1], folders[name], device="cpu")
    bundle = hydraopt.merge(folders, budget=None, max_error=1e-7, dtype="float32", device="cpu")
    with pytest.raises(BundleError, match="one model cannot hold both"):
        bundle.attach(load_base(str(tiny_decoder), None, "CAUSAL_LM").model)
    assert evaluate_bundle_tasks(tasks, bundle, device="cpu") == own


def test_a_bundle_without_the_head_of_a_task_is_refused(topic_task, tiny_encoder, tmp_path):
    """Its classifier would be random."""
    folder = trained(tmp_path / "a", tiny_encoder, "SEQ_CLS", CONFIGS["lora"]("SEQ_CLS"), 3)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "classifier" not in name},
        folder / "adapter_model.safetensors",
    )
    bundle = hydraopt.merge({"topic": folder}, budget=1.0, device="cpu")
    with pytest.raises(BundleError, match=r"'topic'.*no weights for \['classifier'\].*random"):
        evaluate_bundle_tasks([topic_task()], bundle, device="cpu")


@pytest.mark.parametrize("name", ["vera", "prompt"])
def test_an_adapter_for_a_base_of_another_width_is_refused(topic_task, tiny_encoder, tmp_path, name):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )  # fmt: skip
    save_model(BertModel, config, tokenizer, tmp_path / "wide")
    folder = trained(tmp_path / "a", tmp_path / "wide", "SEQ_CLS", CONFIGS[name]("SEQ_CLS"), 3)
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(tmp_path / "wide"), str(tiny_encoder)))
    with pytest.raises(AdapterFormatError, match=r"48.*32"):
        evaluate_adapter(topic_task(), folder, device="cpu")


def test_virtual_tokens_take_positions_of_a_long_text(topic_task, tiny_encoder, tmp_path):
    """The tiny encoder has 64; with 5 of them taken, 59 are left for a text."""
    folder = trained(tmp_path / "a", tiny_encoder, "SEQ_CLS", CONFIGS["prompt"]("SEQ_CLS"), 3)
    rows = [{"text": "the " * 200 + "apple", "label": "fruit"}]
    assert evaluate_adapter(topic_task(), folder, rows=rows, device="cpu").samples == 1
    many = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=64)
    folder = trained(tmp_path / "b", tiny_encoder, "SEQ_CLS", many, 3)
    with pytest.raises(TaskFileError, match="64 virtual tokens leave no position"):
        evaluate_adapter(topic_task(), folder, rows=rows, device="cpu")


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_base_that_takes_no_virtual_tokens_is_named(topic_task, tiny_seq2seq, tmp_path, name):
    config = CONFIGS[name]("SEQ_CLS")
    config.modules_to_save = ["classification_head"]
    folder = trained(tmp_path / "a", tiny_seq2seq, "SEQ_CLS", config, 3)
    with pytest.raises(
        TaskFileError, match=r"tiny-seq2seq' cannot be run behind an adapter's virtual tokens: "
    ):
        evaluate_adapter(topic_task(base_model=str(tiny_seq2seq)), folder, device="cpu")


def test_a_token_without_an_embedding_is_told(topic_task, echo_task, tiny_encoder, tiny_decoder, tmp_path):
    """A tokenizer that was given more words than the model."""
    for base, kind in ((tiny_encoder, "SEQ_CLS"), (tiny_decoder, "CAUSAL_LM")):
        other = tmp_path / kind
        shutil.copytree(base, other)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(["melon"])
        tokenizer.save_pretrained(other)
        labels = 3 if kind == "SEQ_CLS" else None
        folder = trained(tmp_path / f"a-{kind}", other, kind, CONFIGS["lora"](kind), labels)
        if labels:
            task, rows = topic_task(base_model=str(other)), [{"text": "a melon", "label": "fruit"}]
        else:
            task, rows = echo_task(other), [{"input": "a melon", "target": "melon"}]
        with pytest.raises(
            TaskFileError, match=r"row 0: the tokenizer gives 'melon' the number 30.*30 tokens"
        ):
            evaluate_adapter(task, folder, rows=rows, device="cpu")


def test_padding_behind_an_answer_is_no_part_of_it(echo_task, tiny_decoder):
    """Whatever token it is, and whether the tokenizer takes it for a word."""
    model, tokenizer = load_base_model(str(tiny_decoder), None, "CAUSAL_LM")
    tokenizer.pad_token = "apple"
    task = echo_task(tiny_decoder)
    rows = task.read_rows("test")
    end = tokenizer.eos_token_id

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        """Every other row ends at once, the others never: they say a word of their own."""
        scores = torch.zeros(*hidden.shape[:-1], len(tokenizer))
        scores[..., 10] = 1
        scores[::2, :, end] = 2
        return scores

    model.lm_head.forward = forward
    with torch.inference_mode():
        found = predict_texts(task, model, tokenizer, rows, batch_size=len(rows))
    word = tokenizer.convert_ids_to_tokens(10)
    assert sorted(set(found)) == ["", " ".join([word] * task.max_new_tokens)]


def test_a_model_that_reads_padding_gets_none(topic_task, echo_task, tmp_path):
    """A convolution looks over a text's end; BERT as a decoder counts positions from the padding."""
    tokenizer = word_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "initializer_range": 0.5, "pad_token_id": 0,
    }  # fmt: skip
    save_model(ConvBertModel, ConvBertConfig(**sizes, embedding_size=32), tokenizer, tmp_path / "conv")
    task = topic_task(base_model=str(tmp_path / "conv"))
    model, tokenizer = load_base_model(task.base_model, None, "SEQ_CLS", 3)
    rows = task.read_rows("test")
    with torch.inference_mode():
        texts = [tokenizer(row["text"], return_tensors="pt") for row in rows]
        expected = [task.labels[int(model(**text).logits[0].argmax())] for text in texts]
        assert len(set(expected)) > 1
        for size in (1, 7, 64):
            assert predict_labels(task, model, tokenizer, rows, batch_size=size) == expected

    tokenizer = word_tokenizer(bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    config = BertConfig(**sizes, is_decoder=True, bos_token_id=2, eos_token_id=3)
    save_model(BertLMHeadModel, config, tokenizer, tmp_path / "decoder")
    task = echo_task(tmp_path / "decoder")
    model, tokenizer = load_base_model(task.base_model, None, "CAUSAL_LM")
    rows = task.read_rows("test")
    with torch.inference_mode():
        alone = [predict_texts(task, model, tokenizer, [row], batch_size=1)[0] for row in rows]
        assert len(set(alone)) > 1
        for size in (5, 64):
            assert predict_texts(task, model, tokenizer, rows, batch_size=size) == alone


def test_positions_that_start_behind_the_padding_are_counted(topic_task, tmp_path):
    """RoBERTa's 40 positions are for 38 tokens if its padding is token 1, and its tokenizer need not know."""
    tokenizer = word_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[UNK]", unk_token="[UNK]")
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40, pad_token_id=1,
    )  # fmt: skip
    save_model(RobertaModel, config, tokenizer, tmp_path / "base")
    folder = trained(tmp_path / "a", tmp_path / "base", "SEQ_CLS", CONFIGS["lora"]("SEQ_CLS"), 3)
    rows = [{"text": "the " * 200, "label": "fruit"}]
    task = topic_task(base_model=str(tmp_path / "base"))
    assert evaluate_adapter(task, folder, rows=rows, device="cpu").samples == 1


def test_an_end_token_inside_a_text_is_told_where_the_model_classifies_by_it(
    topic_task, tiny_seq2seq, tmp_path
):
    folder = trained(
        tmp_path / "a",
        tiny_seq2seq,
        "SEQ_CLS",
        LoraConfig(task_type="SEQ_CLS", target_modules=["q", "v"], modules_to_save=["classification_head"]),
        3,
    )
    task = topic_task(base_model=str(tiny_seq2seq))
    assert evaluate_adapter(task, folder, device="cpu").samples == 30
    rows = [{"text": "an apple", "label": "fruit"}, {"text": "an apple [SEP] red", "label": "fruit"}]
    with pytest.raises(TaskFileError, match=r"row 1: 2 end tokens, '\[SEP\]'"):
        evaluate_adapter(task, folder, rows=rows, device="cpu")


class TwoVocabularies(PreTrainedTokenizerFast):
    """Answers in other words than inputs, as Marian's sentencepiece models have them."""

    def _switch_to_target_mode(self) -> None:
        self.backend_tokenizer.normalizer = normalizers.Replace("red", "blue")

    def _switch_to_input_mode(self) -> None:
        self.backend_tokenizer.normalizer = normalizers.Lowercase()


def test_answers_are_encoded_in_their_own_vocabulary():
    plain = word_tokenizer(eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    tokenizer = TwoVocabularies(
        tokenizer_object=plain.backend_tokenizer, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    red, blue = tokenizer.convert_tokens_to_ids(["red", "blue"])
    settings = {"limit": 8, "answer_limit": 1}
    example = training_example(tokenizer, "{input}", "red", "red", start=(0,), **settings)
    assert (example["input_ids"][0], example["labels"]) == (red, [blue])
    example = training_example(tokenizer, "{input}", "red", "red", start=(), **settings)
    assert example["labels"][-1] == red


def test_answers_a_decoder_has_no_embedding_for_are_told(echo_task, tmp_path):
    """Its table may be another than the encoder's, and smaller."""
    tokenizer = word_tokenizer(eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)
    sizes = {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 0,
    }  # fmt: skip
    marian = MarianConfig(
        vocab_size=len(tokenizer), decoder_vocab_size=20, share_encoder_decoder_embeddings=False,
        tie_word_embeddings=False, **sizes,
    )  # fmt: skip
    save_model(MarianMTModel, marian, tokenizer, tmp_path / "marian")
    fsmt = FSMTConfig(src_vocab_size=len(tokenizer), tgt_vocab_size=20, langs=["de", "en"], **sizes)
    save_model(FSMTForConditionalGeneration, fsmt, tokenizer, tmp_path / "fsmt")
    for name, said in (("marian", r"row \d+: .* has embeddings for 20 tokens"), ("fsmt", "encode nothing")):
        model, loaded = load_base_model(str(tmp_path / name), None, "SEQ_2_SEQ_LM")
        task = echo_task(tmp_path / name)
        with pytest.raises(TaskFileError, match=said):
            encoded_rows(task, model, loaded, task.read_rows("train"))


def test_positions_of_either_side_are_counted(echo_task, topic_task, tmp_path):
    """LED has more for what it reads than for what it says; of two models put together each has its own."""
    tokenizer = word_tokenizer(
        cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    led = LEDConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_encoder_position_embeddings=48,
        max_decoder_position_embeddings=16, attention_window=8, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        decoder_start_token_id=3,
    )  # fmt: skip
    sides = [
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=positions,
            pad_token_id=0,
        )
        for positions in (48, 16)
    ]
    both = EncoderDecoderConfig.from_encoder_decoder_configs(
        *sides, decoder_start_token_id=2, pad_token_id=0, eos_token_id=3
    )
    for kind, config in ((LEDForConditionalGeneration, led), (EncoderDecoderModel, both)):
        base = tmp_path / kind.__name__
        save_model(kind, config, tokenizer, base)
        model, loaded = load_base_model(str(base), None, "SEQ_2_SEQ_LM")
        task = echo_task(base, max_length=512, max_new_tokens=16)
        assert input_limit(task, model, loaded) == 48
        with torch.inference_mode():
            assert len(predict_texts(task, model, loaded, [{"input": "the " * 99}], batch_size=1)) == 1
        with pytest.raises(TaskFileError, match="only 16 positions"):
            input_limit(echo_task(base, max_new_tokens=17), model, loaded)
        labels = topic_task(base_model=str(base), max_length=512)
        assert input_limit(labels, model, loaded) == 16  # a classifier reads the text on both sides


def test_what_a_decoder_starts_from_is_read_where_it_stands(echo_task, tiny_seq2seq):
    """generate reads generation_config.json, config.json, then the first token of any text; T5 may name none."""
    model, tokenizer = load_base_model(str(tiny_seq2seq), None, "SEQ_2_SEQ_LM")
    task = echo_task(tiny_seq2seq)
    rows = task.read_rows("test")
    own = model.generation_config

    def start(generation: int | None, config: int | None, first: int | None) -> None:
        own.decoder_start_token_id, own.bos_token_id = generation, first
        model.config.decoder_start_token_id = config

    for tokens, expected in (((5, 6, 7), 5), ((None, 6, 7), 6), ((None, 0, 7), 0), ((None, None, 7), 7)):
        start(*tokens)
        assert answer_start(model) == (expected,)
    answers = {}
    with torch.inference_mode():
        for token in (0, 9):
            start(None, token, None)
            answers[token] = predict_texts(task, model, tokenizer, rows, batch_size=5)
            start(token, None, None)
            assert predict_texts(task, model, tokenizer, rows, batch_size=5) == answers[token]
        assert answers[0] != answers[9]
        start(None, None, None)
        with pytest.raises(
            TaskFileError, match=r"tiny-seq2seq': its config.json has no decoder_start_token_id"
        ):
            predict_texts(task, model, tokenizer, rows, batch_size=5)


def test_a_last_layer_that_shares_its_weight_with_the_first_has_a_name(echo_task, tmp_path):
    """Most small decoders tie the two; LoRA updates the last alone."""
    tokenizer = word_tokenizer(bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        initializer_range=0.2, tie_word_embeddings=True, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    save_model(LlamaForCausalLM, config, tokenizer, tmp_path / "base")
    both = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    folder = trained(tmp_path / "a", tmp_path / "base", "CAUSAL_LM", both)
    task = echo_task(tmp_path / "base")
    model, tokenizer = by_hand(folder, tmp_path / "base", "CAUSAL_LM")
    assert model.get_base_model().lm_head.base_layer.weight is model.get_input_embeddings().weight
    rows = task.read_rows("test")
    with torch.inference_mode():
        expected = predict_texts(task, model, tokenizer, rows, batch_size=1)
    assert len(set(expected)) > 1
    told = [row | {"target": said} for row, said in zip(rows, expected, strict=True) if said]
    assert evaluate_adapter(task, folder, device="cpu", rows=told).value == 1.0


def test_what_a_model_refuses_is_told_with_its_name(topic_task, tmp_path):
    """X-MOD without a default language."""
    tokenizer = word_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    config = XmodConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        languages=["en_XX", "de_DE"], pad_token_id=0,
    )  # fmt: skip
    save_model(XmodModel, config, tokenizer, tmp_path / "base")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["classifier"])
    folder = trained(tmp_path / "a", tmp_path / "base", "SEQ_CLS", config, 3)
    with pytest.raises(
        TaskFileError, match=r"task 'topic': the base model '.*base' cannot be run: Input language"
    ):
        evaluate_adapter(topic_task(base_model=str(tmp_path / "base")), folder, device="cpu")


@pytest.mark.parametrize("kind", ["decoder", "seq2seq"])
def test_answers_that_do_not_fit_the_positions_are_refused(echo_task, tiny_decoder, tmp_path, kind):
    base = tiny_decoder
    if kind == "seq2seq":
        base = small_bart(tmp_path / "bart")
    folder = trained(
        tmp_path / "a",
        base,
        "CAUSAL_LM" if kind == "decoder" else "SEQ_2_SEQ_LM",
        LoraConfig(task_type="CAUSAL_LM" if kind == "decoder" else "SEQ_2_SEQ_LM", target_modules=["q_proj"]),
    )
    positions = 128 if kind == "decoder" else 32
    with pytest.raises(TaskFileError, match=f"max_new_tokens is {positions}.*{positions} positions"):
        evaluate_adapter(echo_task(base, max_new_tokens=positions), folder, device="cpu")
    fits = echo_task(base, max_new_tokens=positions - 1)
    assert evaluate_adapter(fits, folder, device="cpu", limit=2).samples == 2


def small_bart(folder: Path) -> Path:
    tokenizer = word_tokenizer(eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
        init_std=0.2,
    )  # fmt: skip
    save_model(BartForConditionalGeneration, config, tokenizer, folder)
    settings = GenerationConfig(
        decoder_start_token_id=3, forced_bos_token_id=2, eos_token_id=3, pad_token_id=0
    )
    settings.save_pretrained(folder)
    return folder


def test_answers_begin_with_the_token_the_model_is_made_to_begin_with(echo_task, tmp_path):
    """In training as in decoding, where its own settings force it: mBART's language, BART's start."""
    base = small_bart(tmp_path / "bart")
    model, tokenizer = load_base_model(str(base), None, "SEQ_2_SEQ_LM")
    task = echo_task(base)
    rows = task.read_rows("test")
    labels = [example["labels"] for example in encoded_rows(task, model, tokenizer, rows)]
    assert labels[0] == [2, *tokenizer(rows[0]["target"], add_special_tokens=False)["input_ids"], 3]

    expected = []
    for row in rows:
        ids, answer = tokenizer(f"the {row['input']} is", return_tensors="pt"), [3, 2]
        with torch.inference_mode():
            while len(answer) < 6 and 3 not in answer[1:]:
                logits = model(**ids, decoder_input_ids=torch.tensor([answer])).logits
                answer.append(int(logits[0, -1].argmax()))
        expected.append(tokenizer.decode(answer[2:], skip_special_tokens=True).strip())
    with torch.inference_mode():
        assert predict_texts(task, model, tokenizer, rows, batch_size=5) == expected


def test_decoding_stops_at_the_models_ends_and_at_the_tokenizers(echo_task, tiny_decoder, tmp_path):
    """Training teaches the tokenizer's; a chat model's own list often leaves it out. 0 is a token, too."""
    shutil.copytree(tiny_decoder, tmp_path / "base")
    model, tokenizer = load_base_model(str(tmp_path / "base"), None, "CAUSAL_LM")
    task = echo_task(tmp_path / "base")
    rows = task.read_rows("test")
    end = tokenizer.eos_token_id

    class Scripted(torch.nn.Module):
        """Says one token more often than any other."""

        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            scores = torch.zeros(*hidden.shape[:-1], len(tokenizer))
            scores[..., self.token] = 1
            return scores

    def lengths(token: int, own: Any) -> set[int]:
        model.lm_head = Scripted(token)
        model.generation_config.eos_token_id = own
        seen = []
        generate = model.generate

        def watched(**given: Any) -> Any:
            answer = generate(**given)
            if isinstance(answer, torch.Tensor):  # the others only try whether padding matters
                seen.append(answer.shape[1] - given["input_ids"].shape[1])
            return answer

        model.generate = watched
        try:
            with torch.inference_mode():
                predict_texts(task, model, tokenizer, rows, batch_size=4)
        finally:
            del model.generate
        return set(seen)

    other = 7
    assert lengths(end, [other]) == {1}
    assert lengths(other, [other, 9]) == {1}
    assert lengths(0, 0) == {1}
    assert lengths(end, None) == {1}
    assert lengths(5, [other]) == {task.max_new_tokens}


def test_nothing_of_the_bases_own_settings_is_followed(echo_task, tiny_decoder):
    """What is measured is the model; its own settings are as they were afterwards."""
    model, tokenizer = load_base_model(str(tiny_decoder), None, "CAUSAL_LM")
    task = echo_task(tiny_decoder)
    rows = task.read_rows("test")
    with torch.inference_mode():
        plain = predict_texts(task, model, tokenizer, rows, batch_size=4)
        odd = {
            "do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
            "min_new_tokens": 4, "suppress_tokens": list(range(4, 20)), "begin_suppress_tokens": [20, 21],
            "bad_words_ids": [[22]], "num_return_sequences": 2, "num_beams": 2, "return_dict_in_generate": True,
            "max_time": 1e-9, "penalty_alpha": 0.6, "stop_strings": ["a"], "forced_eos_token_id": 3,
            "exponential_decay_length_penalty": (1, 5.0), "guidance_scale": 3.0,
        }  # fmt: skip
        model.generation_config.update(**odd)
        before = model.generation_config.to_dict()
        assert predict_texts(task, model, tokenizer, rows, batch_size=4) == plain
    assert model.generation_config.to_dict() == before
