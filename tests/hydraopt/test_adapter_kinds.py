"""Every kind of adapter, made by PEFT itself: read, merged, written back and attached without a change of meaning."""

from __future__ import annotations

import json

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hydraopt
from hydraopt.errors import AdapterFormatError, BundleError

TOKENS = torch.arange(14).reshape(2, 7) % 11


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=11, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert(labels=3):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=11,
        num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=11,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


@torch.no_grad()
def logits(model):
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS[:, :4]
    return model(**inputs).logits


def trained(base, config, folder, seed=0, change=None):
    """A PEFT adapter with random numbers wherever PEFT would train some, saved by PEFT; returns its logits."""
    model = get_peft_model(base(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.5 * noise
    if change is not None:
        change(model)
    expected = logits(model)
    model.peft_config["default"].base_model_name_or_path = "tiny/base"
    model.save_pretrained(folder)
    return expected


def prune(model):
    """What AdaLoRA's training leaves behind: directions switched off, and their pattern in the configuration."""
    pattern = {}
    for number, (name, layer) in enumerate(
        (name, layer) for name, layer in model.base_model.model.named_modules() if hasattr(layer, "lora_E")
    ):
        mask = [place % 5 != number % 5 and number != 3 for place in range(5)]
        layer.lora_E["default"].data[[not keep for keep in mask]] = 0
        pattern[f"{name}.lora_E.default"] = mask
    model.peft_config["default"].rank_pattern = pattern


CAUSAL, SEQ_CLS, SEQ2SEQ = "CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM"
ADA = {"init_r": 5, "total_step": 10, "lora_alpha": 7}
CASES = {
    "dora": (
        llama,
        LoraConfig(task_type=CAUSAL, use_dora=True, r=3, target_modules=["q_proj", "down_proj"]),
        None,
    ),
    "dora rslora cls": (
        bert,
        LoraConfig(
            task_type=SEQ_CLS, use_dora=True, use_rslora=True, r=3, lora_alpha=5, target_modules=["query"]
        ),
        None,
    ),
    "embedding": (
        llama,
        LoraConfig(task_type=CAUSAL, r=3, lora_alpha=4, target_modules=["embed_tokens", "q_proj"]),
        None,
    ),
    "embedding dora": (
        llama,
        LoraConfig(
            task_type=CAUSAL, r=3, lora_alpha=4, use_dora=True, target_modules=["embed_tokens", "v_proj"]
        ),
        None,
    ),
    "embedding cls": (
        bert,
        LoraConfig(task_type=SEQ_CLS, r=2, target_modules=["word_embeddings", "value"]),
        None,
    ),
    "output table": (llama, LoraConfig(task_type=CAUSAL, r=2, target_modules=["lm_head", "q_proj"]), None),
    "adalora": (llama, AdaLoraConfig(task_type=CAUSAL, target_modules=["q_proj", "up_proj"], **ADA), None),
    "adalora pruned": (
        llama,
        AdaLoraConfig(task_type=CAUSAL, target_modules=["q_proj", "v_proj"], **ADA),
        prune,
    ),
    "adalora seq2seq": (t5, AdaLoraConfig(task_type=SEQ2SEQ, target_modules=["q", "wo"], **ADA), prune),
    "adalora cls": (bert, AdaLoraConfig(task_type=SEQ_CLS, target_modules=["query"], **ADA), None),
    "lora seq2seq": (t5, LoraConfig(task_type=SEQ2SEQ, r=3, target_modules=["q", "v"]), None),
    "modules to save": (
        llama,
        LoraConfig(task_type=CAUSAL, r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kind_survives_merging_export_and_attaching(case, tmp_path):
    base, config, change = CASES[case]
    expected = trained(base, config, tmp_path / "task", change=change)
    assert (expected - logits(base())).abs().max() > 5e-2  # the adapter does something
    adapter = hydraopt.read_adapter(tmp_path / "task")
    bundle = hydraopt.merge({"task": adapter}, budget=1.0, dtype="float32")
    assert bundle.manifest.tasks["task"].kind == adapter.kind == config.peft_type

    folder = bundle.export(tmp_path / "out")["task"]
    reloaded = PeftModel.from_pretrained(base(), folder).eval()
    # float32 through a merge: a few hundred eps of logits of order one.
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(bundle.attach(base())), expected, rtol=0, atol=1e-4)
    again = hydraopt.read_adapter(folder)
    assert {name: module.layer for name, module in again.modules.items()} == {
        name: module.layer for name, module in adapter.modules.items() if name in again.modules
    }


def test_kinds_of_one_model_live_in_one_bundle(tmp_path):
    names = ["dora", "embedding", "adalora", "adalora pruned", "modules to save", "embedding dora"]
    expected = {
        name.replace(" ", "-"): trained(
            llama, CASES[name][1], tmp_path / name.replace(" ", "-"), seed, CASES[name][2]
        )
        for seed, name in enumerate(names)
    }
    bundle = hydraopt.merge({task: tmp_path / task for task in expected}, budget=1.0, dtype="float32")
    bundle = hydraopt.Bundle.load(bundle.save(tmp_path / "bundle"))
    model = bundle.attach(llama())
    folders = bundle.export(tmp_path / "out")
    for task, wanted in expected.items():
        model.set_adapter(task)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
        reloaded = PeftModel.from_pretrained(llama(), folders[task]).eval()
        torch.testing.assert_close(logits(reloaded), wanted, rtol=0, atol=1e-4)


def test_a_layer_replaced_by_one_task_and_updated_by_another_is_not_attached(tmp_path):
    """PEFT cannot hold both in one model; export can."""
    for task in ("output table", "modules to save"):
        trained(llama, CASES[task][1], tmp_path / task.split()[0])
    bundle = hydraopt.merge({task: tmp_path / task for task in ("output", "modules")}, budget=1.0)
    with pytest.raises(BundleError, match=r"'modules' replaces 'lm_head' whole.*'output' updates it.*Export"):
        bundle.attach(llama())
    assert len(bundle.export(tmp_path / "out")) == 2


def test_adalora_equals_peft_update_by_update(tmp_path):
    """PEFT's own get_delta_weight is the reference: the initial rank divides, also after pruning."""
    _, config, _ = CASES["adalora pruned"]
    trained(llama, config, tmp_path / "task", change=prune)
    model = PeftModel.from_pretrained(llama(), tmp_path / "task")
    adapter = hydraopt.read_adapter(tmp_path / "task")
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_E")
    }
    assert set(adapter.modules) == set(layers)
    assert sorted(module.rank for module in adapter.modules.values()) == [
        1,
        4,
        4,
        4,
    ]  # one was pruned to nothing
    for name, layer in layers.items():
        up, down = adapter.factors(name, torch.float64)
        torch.testing.assert_close((up @ down).float(), layer.get_delta_weight("default").detach())


def test_a_dora_keeps_its_magnitudes_where_the_direction_is_cut(tmp_path):
    """At a rank of 0 the magnitude still rescales the weight: export must not drop the module."""
    trained(llama, CASES["dora"][1], tmp_path / "task")
    bundle = hydraopt.merge({"task": tmp_path / "task"}, method="separate", rank=1, dtype="float32")
    module = bundle.manifest.modules[0]
    bundle.contents.heads["task"][: sum(module.shape)] = 0
    folder = bundle.export(tmp_path / "out")["task"]
    tensors = load_file(folder / "adapter_model.safetensors")
    original = load_file(tmp_path / "task" / "adapter_model.safetensors")
    magnitudes = [name for name in original if name.endswith("lora_magnitude_vector")]
    assert len(magnitudes) == 4
    assert all(torch.equal(tensors[name], original[name]) for name in magnitudes)
    attached = logits(bundle.attach(llama()))
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(), folder).eval()), attached, rtol=0, atol=1e-5
    )


def test_attached_layers_take_the_dtype_of_the_base(tmp_path):
    """A classifier saved in float32 must not break a bfloat16 base."""
    trained(bert, CASES["adalora cls"][1], tmp_path / "task")
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0)
    model = bundle.attach(bert().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_a_resized_table_is_not_attached_beside_others(tmp_path):
    trained(llama, CASES["embedding"][1], tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, file)
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0)
    with pytest.raises(BundleError, match=r"'task'.*embed_tokens.*export"):
        bundle.attach(llama())


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("case", "changes", "word"),
    [
        ("adalora", {"init_r": 6}, "rank 6"),
        ("adalora", {"init_r": None}, "init_r"),
        ("adalora", {"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "rank_pattern"),
        ("adalora pruned", {"rank_pattern": None}, "rank 5"),
        ("adalora", {"target_modules": ["q_proj"]}, "up_proj.*target_modules"),
        ("adalora", {"use_dora": True}, "AdaLoRA has no DoRA"),
        ("dora", {"use_dora": False}, "use_dora is not set"),
        ("dora", {"kasa_config": {"beta": 1}}, "KaSA"),
        ("embedding", {"trainable_token_indices": [1]}, "token rows"),
    ],
)
def test_what_contradicts_the_kind_is_refused(case, changes, word, tmp_path):
    base, config, change = CASES[case]
    trained(base, config, tmp_path / "task", change=change)
    edit(tmp_path / "task", **changes)
    with pytest.raises(AdapterFormatError, match=word):
        hydraopt.read_adapter(tmp_path / "task")


@pytest.mark.parametrize("missing", ["lora_E", "lora_B"])
def test_an_incomplete_adalora_is_refused(missing, tmp_path):
    trained(llama, CASES["adalora"][1], tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.model.layers.1.self_attn.q_proj.{missing}"]
    save_file(tensors, file)
    with pytest.raises(AdapterFormatError, match=rf"q_proj' lacks .*{missing}"):
        hydraopt.read_adapter(tmp_path / "task")
