"""Every kind of adapter, made by PEFT itself: read, merged, written back and attached without a change of meaning."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import hydraopt
from hydraopt.adapters.vera import projections
from hydraopt.errors import AdapterFormatError, AdapterMismatchError, BundleError, HydraoptError

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


def gpt2():
    """Its linear layers are transposed: Conv1D, whose weight is (d_in, d_out)."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


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
    return model(**inputs).logits[..., -7:, :]  # a prompt's own positions come first


def trained(base, config, folder, seed=0, *, change=None, name="tiny/base"):
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
    model.peft_config["default"].base_model_name_or_path = name
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
    "conv1d": (
        gpt2,
        LoraConfig(task_type=CAUSAL, r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]),
        None,
    ),
    "conv1d dora": (
        gpt2,
        LoraConfig(task_type=CAUSAL, r=3, use_dora=True, fan_in_fan_out=True, target_modules=["c_attn"]),
        None,
    ),
    "conv1d adalora": (
        gpt2,
        AdaLoraConfig(task_type=CAUSAL, fan_in_fan_out=True, target_modules=["mlp.c_proj"], **ADA),
        None,
    ),
    "conv1d vera": (
        gpt2,
        VeraConfig(task_type=CAUSAL, r=5, fan_in_fan_out=True, target_modules=["c_attn", "mlp.c_proj"]),
        None,
    ),
    "vera": (llama, VeraConfig(task_type=CAUSAL, r=6, target_modules=["q_proj", "down_proj"]), None),
    "vera by key": (
        llama,
        VeraConfig(
            task_type=CAUSAL,
            r=6,
            target_modules=["q_proj", "v_proj"],
            save_projection=False,
            projection_prng_key=5,
        ),
        None,
    ),
    "vera cls": (bert, VeraConfig(task_type=SEQ_CLS, r=4, target_modules=["query", "output.dense"]), None),
    "vera seq2seq": (t5, VeraConfig(task_type=SEQ2SEQ, r=4, target_modules=["q", "wi"]), None),
    "prompt": (llama, PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=5), None),
    "prompt cls": (bert, PromptTuningConfig(task_type=SEQ_CLS, num_virtual_tokens=3), None),
    "prompt seq2seq": (t5, PromptTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=3), None),
    "prefix": (llama, PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=4), None),
    "prefix seq2seq": (t5, PrefixTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=4), None),
    "prefix projected": (
        llama,
        PrefixTuningConfig(
            task_type=CAUSAL, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
        ),
        None,
    ),
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
            llama, CASES[name][1], tmp_path / name.replace(" ", "-"), seed, change=CASES[name][2]
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


def vera(**changes):
    return VeraConfig(**({"task_type": CAUSAL, "r": 6, "target_modules": ["q_proj", "down_proj"]} | changes))


VERA_TASKS = {
    "wide": vera(),
    "narrow": vera(target_modules=["q_proj", "v_proj"]),  # other projections: its widest layer is narrower
    "same": vera(target_modules=["v_proj", "down_proj", "q_proj"]),
    "all": vera(target_modules=["gate_proj", "q_proj", "o_proj"], modules_to_save=["lm_head"]),
}


def test_vera_tasks_of_other_targets_live_in_one_model(tmp_path):
    expected = {
        task: trained(llama, config, tmp_path / task, seed)
        for seed, (task, config) in enumerate(VERA_TASKS.items())
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
    projections = model.base_model.vera_A
    assert projections["wide"].data_ptr() == projections["same"].data_ptr()  # equal ones are in memory once
    assert projections["wide"].shape != projections["narrow"].shape


@pytest.mark.parametrize(
    ("key", "rank", "d_out", "d_in"), [(0, 4, 16, 24), (7, 33, 130, 57), (2**40, 1, 3, 5)]
)
def test_projections_are_drawn_number_for_number_as_peft_draws_them(key, rank, d_out, d_in):
    base = torch.nn.Sequential(torch.nn.Linear(d_in, d_out))
    config = VeraConfig(r=rank, projection_prng_key=key, target_modules=["0"])
    model = get_peft_model(base, config).base_model
    a, b = projections(key, rank, d_out, d_in)
    assert torch.equal(a, model.vera_A["default"])
    assert torch.equal(b, model.vera_B["default"])


def test_vera_is_exactly_lora_in_portable_folders(tmp_path):
    """The reference is PEFT's get_delta_weight; the ranks stay VeRA's, padded to the next the servers know."""
    llama().config.save_pretrained(tmp_path / "base")
    wanted = trained(llama, vera(r=8), tmp_path / "task", name=str(tmp_path / "base"))
    original = PeftModel.from_pretrained(llama(), tmp_path / "task")
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0, dtype="float32")
    folder = bundle.export(tmp_path / "out", profile="portable")["task"]
    lora = hydraopt.read_adapter(folder)
    assert (lora.kind, {module.rank for module in lora.modules.values()}) == ("LORA", {8})
    for name, module in original.named_modules():
        if hasattr(module, "vera_lambda_b"):
            up, down = lora.factors(name.removeprefix("base_model.model."))
            torch.testing.assert_close(
                up @ down, module.get_delta_weight("default").detach(), rtol=1e-5, atol=1e-6
            )
    reloaded = PeftModel.from_pretrained(llama(), folder).eval()
    torch.testing.assert_close(logits(reloaded), wanted, rtol=0, atol=1e-4)


def test_portable_vera_needs_the_base_model_it_was_trained_on(tmp_path):
    trained(llama, vera(), tmp_path / "task", name=str(tmp_path / "base"))
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0, dtype="float32")
    with pytest.raises(HydraoptError, match=r"base model .* cannot be loaded"):
        bundle.export(tmp_path / "out", profile="portable")
    other = LlamaConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=11
    )
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(BundleError, match=r"'task' updates .*16 outputs.*\(32, 24\)"):
        bundle.export(tmp_path / "out", profile="portable")
    with pytest.raises(BundleError, match="16 outputs"):
        bundle.attach(LlamaForCausalLM(other))
    wider = LlamaConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=11
    )
    wider.save_pretrained(tmp_path / "base")
    for use in (
        lambda: bundle.export(tmp_path / "out", profile="portable"),
        lambda: bundle.attach(LlamaForCausalLM(wider)),
    ):
        with pytest.raises(BundleError, match="projections 24 wide"):
            use()


@pytest.mark.parametrize(("setting", "value"), [("projection_prng_key", 3), ("r", 5)])
def test_vera_tasks_of_other_projections_are_not_merged(setting, value, tmp_path):
    trained(llama, vera(), tmp_path / "a")
    trained(llama, vera(**{setting: value}), tmp_path / "b")
    with pytest.raises(AdapterMismatchError, match=rf"'b'.*{setting}={value}.*'a'"):
        hydraopt.merge({"a": tmp_path / "a", "b": tmp_path / "b"}, budget=1.0)


def test_projections_saved_along_do_not_flatter_the_storage_ratio(tmp_path):
    """They follow from a key, so they are not counted among what the bundle is compared with."""
    for task, saved in (("with", True), ("without", False)):
        trained(llama, vera(save_projection=saved), tmp_path / task)
    one, other = (hydraopt.read_adapter(tmp_path / task) for task in ("with", "without"))
    numbers = 4 * (6 + 16)  # two layers, two targets of 16 outputs, r = 6
    for adapter in (one, other):
        assert (
            adapter.reference_bytes == 2 * numbers + (adapter.folder / "adapter_config.json").stat().st_size
        )
    assert sum(entry.numbers for entry in one.file.entries.values()) == numbers + 6 * 24 + 16 * 6


def test_prompts_of_any_length_live_in_one_model(tmp_path):
    lengths = {"long": 9, "short": 2, "same": 9}
    expected = {
        task: trained(
            llama, PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=length), tmp_path / task, seed
        )
        for seed, (task, length) in enumerate(lengths.items())
    }
    bundle = hydraopt.merge({task: tmp_path / task for task in expected}, budget=1.0, dtype="float32")
    assert [module.shape for module in bundle.manifest.modules] == [(2, 16), (9, 16)]
    model = bundle.attach(llama())
    for task, wanted in expected.items():
        model.set_adapter(task)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


def test_prompts_of_classifiers_keep_their_own_labels(tmp_path):
    labels = {"three": 3, "five": 5}
    expected = {
        task: trained(
            lambda count=count: bert(count),
            PromptTuningConfig(task_type=SEQ_CLS, num_virtual_tokens=4),
            tmp_path / task,
            count,
        )
        for task, count in labels.items()
    }
    bundle = hydraopt.merge({task: tmp_path / task for task in labels}, budget=1.0, dtype="float32")
    model = bundle.attach(bert(2))
    for task, wanted in expected.items():
        model.set_adapter(task)
        torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)


def test_kinds_of_other_spaces_share_a_bundle_but_not_a_model(tmp_path):
    names = {"lora": "dora", "vectors": "vera", "tokens": "prompt", "prefix": "prefix"}
    expected = {
        task: trained(llama, CASES[case][1], tmp_path / task, seed)
        for seed, (task, case) in enumerate(names.items())
    }
    bundle = hydraopt.merge({task: tmp_path / task for task in names}, budget=1.0, dtype="float32")
    assert {task: entry.kind for task, entry in bundle.manifest.tasks.items()} == {
        "lora": "LORA", "vectors": "VERA", "tokens": "PROMPT_TUNING", "prefix": "PREFIX_TUNING",
    }  # fmt: skip
    for task, folder in bundle.export(tmp_path / "out").items():
        reloaded = PeftModel.from_pretrained(llama(), folder).eval()
        torch.testing.assert_close(logits(reloaded), expected[task], rtol=0, atol=1e-4)
    with pytest.raises(BundleError, match=r"LORA \(task 'lora'\).*VERA \(task 'vectors'\).*tasks="):
        bundle.attach(llama())
    for task in names:
        torch.testing.assert_close(
            logits(bundle.attach(llama(), tasks=[task])), expected[task], rtol=0, atol=1e-4
        )
    for wrong, words in (([], "no task to attach"), (["lora", "none"], "no task 'none'")):
        with pytest.raises(BundleError, match=words):
            bundle.attach(llama(), tasks=wrong)


@pytest.mark.parametrize("case", ["dora", "embedding", "vera", "prompt", "modules to save"])
@pytest.mark.parametrize("task", ["intent.pt-BR", "update"])
def test_tasks_that_torch_takes_no_adapter_of_their_name_for_get_another(case, task, tmp_path):
    base, config, _ = CASES[case]
    expected = trained(base, config, tmp_path / "a")
    bundle = hydraopt.merge({task: tmp_path / "a"}, budget=1.0, dtype="float32")
    with pytest.raises(BundleError, match=f"'{task}'.*no adapter named '{task}'.*tasks="):
        bundle.attach(base())
    attached = bundle.attach(base(), tasks={"mine": task})
    torch.testing.assert_close(logits(attached), expected, rtol=0, atol=1e-4)
    assert list(attached.peft_config) == ["mine"]


def test_a_layer_replaced_by_one_task_and_updated_by_another_is_not_attached(tmp_path):
    """PEFT cannot hold both in one model; export can."""
    for task in ("output table", "modules to save"):
        trained(llama, CASES[task][1], tmp_path / task.split()[0])
    bundle = hydraopt.merge({task: tmp_path / task for task in ("output", "modules")}, budget=1.0)
    with pytest.raises(BundleError, match=r"'modules' replaces 'lm_head' whole.*'output' updates it.*Export"):
        bundle.attach(llama(), tasks={"a": "modules", "b": "output"})
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


def test_adalora_divides_by_slightly_more_than_its_rank(tmp_path):
    """PEFT divides by rank + 1e-5; at rank 1 that is ten times the tolerance below."""
    config = AdaLoraConfig(task_type=CAUSAL, init_r=1, total_step=10, target_modules=["q_proj"])
    trained(llama, config, tmp_path / "task")
    model = PeftModel.from_pretrained(llama(), tmp_path / "task")
    name = "model.layers.0.self_attn.q_proj"
    up, down = hydraopt.read_adapter(tmp_path / "task").factors(name, torch.float64)
    expected = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach()
    torch.testing.assert_close((up @ down).float(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("change", [None, prune])
def test_adalora_without_an_alpha_is_scaled_as_peft_scales_it(change, tmp_path):
    """Where lora_alpha is 0, PEFT takes the rank for it; its own logits are the reference."""
    config = AdaLoraConfig(task_type=CAUSAL, target_modules=["q_proj", "v_proj"], **ADA | {"lora_alpha": 0})
    trained(llama, config, tmp_path / "task", change=change)
    peft = PeftModel.from_pretrained(llama(), tmp_path / "task").eval()
    for name, layer in peft.base_model.model.named_modules():
        if hasattr(layer, "lora_E"):
            up, down = hydraopt.read_adapter(tmp_path / "task").factors(name, torch.float64)
            torch.testing.assert_close((up @ down).float(), layer.get_delta_weight("default").detach())
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0, dtype="float32")
    torch.testing.assert_close(logits(bundle.attach(llama())), logits(peft), rtol=0, atol=1e-4)


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


def test_a_dora_without_a_direction_is_attached_beside_those_that_share_theirs(tmp_path):
    """Its magnitudes act on; A' of the others is not its to use."""

    def shared_init(model):
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))

    def no_direction(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()

    def wide():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=96,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=11,
            )
        ).eval()

    config = {"task_type": CAUSAL, "use_dora": True, "r": 4, "target_modules": ["down_proj"]}
    changes = {"none": no_direction, **{f"t{seed}": shared_init for seed in range(5)}}
    expected = {
        task: trained(wide, LoraConfig(**config), tmp_path / task, seed, change=change)
        for seed, (task, change) in enumerate(changes.items())
    }
    bundle = hydraopt.merge({task: tmp_path / task for task in changes}, max_error=1e-3, dtype="float32")
    assert bundle.shared_rows()
    model = bundle.attach(wide())
    model.set_adapter("none")
    torch.testing.assert_close(logits(model), expected["none"], rtol=0, atol=1e-4)


def test_attached_layers_take_the_dtype_of_the_base(tmp_path):
    """A classifier saved in float32 must not break a bfloat16 base."""
    trained(bert, CASES["adalora cls"][1], tmp_path / "task")
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0)
    model = bundle.attach(bert().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_a_copy_of_a_table_is_compared_in_the_dtype_of_the_base(tmp_path):
    """The adapter was trained on the base in float32; in bfloat16 the table is the same one, rounded."""
    trained(llama, CASES["embedding"][1], tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    table = load_file(file)["base_model.model.model.embed_tokens.base_layer.weight"]
    assert table.dtype == torch.float32
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0)
    assert logits(bundle.attach(llama().to(torch.bfloat16))).isfinite().all()


class Normed(nn.Module):
    """A linear layer and a norm with statistics that are no parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.first(x))


def test_statistics_of_a_replaced_layer_are_each_tasks_own(tmp_path):
    torch.manual_seed(0)
    base = Normed().eval()
    x = torch.randn(4, 6)
    expected = {}
    for seed, task in enumerate(("one", "two"), start=1):
        config = LoraConfig(target_modules=["first"], modules_to_save=["norm"], r=2, init_lora_weights=False)
        model = get_peft_model(copy.deepcopy(base), config)
        norm = model.base_model.model.norm.modules_to_save["default"]
        norm.running_mean.fill_(seed)
        norm.running_var.fill_(seed + 1)
        model.peft_config["default"].base_model_name_or_path = "tiny/base"
        model.save_pretrained(tmp_path / task)
        expected[task] = model.eval()(x).detach()
    bundle = hydraopt.merge({task: tmp_path / task for task in expected}, budget=1.0, dtype="float32")
    model = bundle.attach(copy.deepcopy(base)).eval()
    for task, wanted in expected.items():
        model.set_adapter(task)
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-4)
    narrow = bundle.attach(copy.deepcopy(base).to(torch.bfloat16))
    buffers = {name: buffer for name, buffer in narrow.named_buffers() if "running" in name}
    assert {buffer.dtype for buffer in buffers.values()} == {torch.bfloat16}


@pytest.mark.parametrize("case", ["vera", "vera by key"])
def test_a_vera_folder_says_whether_its_projections_are_inside(case, tmp_path):
    trained(llama, CASES[case][1], tmp_path / "task")
    folder = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0).export(tmp_path / "out")["task"]
    said = json.loads((folder / "adapter_config.json").read_text())["save_projection"]
    assert (
        said == ("base_model.vera_A" in load_file(folder / "adapter_model.safetensors")) == (case == "vera")
    )


def test_a_resized_table_is_not_attached_beside_others(tmp_path):
    trained(llama, CASES["embedding"][1], tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
    save_file(tensors, file)
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0)
    with pytest.raises(BundleError, match=r"'task'.*embed_tokens.*export"):
        bundle.attach(llama())


def test_a_table_that_was_only_rounded_on_saving_is_the_base_models_own(tmp_path):
    trained(llama, CASES["embedding"][1], tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    bundle = hydraopt.merge({"task": tmp_path / "task"}, budget=1.0)
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "task").eval())
    torch.testing.assert_close(logits(bundle.attach(llama())), expected, rtol=0, atol=2e-2)  # of bfloat16


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
        ("adalora", {"rank_pattern": {"model.layers.9.q_proj.lora_E": [True] * 5}}, "layers.9.*no tensors"),
        ("adalora", {"target_modules": ["q_proj"]}, "up_proj.*target_modules"),
        ("adalora", {"use_dora": True}, "AdaLoRA has no DoRA"),
        ("dora", {"use_dora": False}, "use_dora is not set"),
        ("dora", {"kasa_config": {"beta": 1}}, "KaSA"),
        ("embedding", {"trainable_token_indices": [1]}, "token rows"),
        ("vera", {"r": 7}, "r=7"),
        ("vera", {"projection_prng_key": 1}, "projection_prng_key=1.*save_as_lora"),
        ("vera", {"bias": "vera_only"}, "bias"),
        ("vera", {"target_modules": ["q_proj"]}, "down_proj.*target_modules"),
        ("vera by key", {"save_projection": True}, "save_projection is set"),
        ("prompt", {"num_virtual_tokens": 6}, r"\[5, 16\].*\[6, 16\]"),
        ("prompt", {"num_layers": None}, "num_layers"),
        ("prefix", {"num_layers": 3}, r"\[4, 32\].*\[4, 48\]"),
        ("prefix", {"some_new_switch": 1}, "some_new_switch"),
    ],
)
def test_what_contradicts_the_kind_is_refused(case, changes, word, tmp_path):
    base, config, change = CASES[case]
    trained(base, config, tmp_path / "task", change=change)
    edit(tmp_path / "task", **changes)
    with pytest.raises(AdapterFormatError, match=word):
        hydraopt.read_adapter(tmp_path / "task")


@pytest.mark.parametrize(
    ("case", "missing", "words"),
    [
        ("adalora", "model.model.layers.1.self_attn.q_proj.lora_E", "q_proj' lacks .*lora_E"),
        ("adalora", "model.model.layers.1.self_attn.q_proj.lora_B", "q_proj' lacks .*lora_B"),
        ("vera", "vera_A", r"base_model\.vera_[AB]' is there without its partner"),
        ("vera", "vera_B", r"base_model\.vera_[AB]' is there without its partner"),
    ],
)
def test_a_tensor_that_its_partners_need_is_missed(case, missing, words, tmp_path):
    trained(llama, CASES[case][1], tmp_path / "task")
    file = tmp_path / "task" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.{missing}"]
    save_file(tensors, file)
    with pytest.raises(AdapterFormatError, match=words):
        hydraopt.read_adapter(tmp_path / "task")
