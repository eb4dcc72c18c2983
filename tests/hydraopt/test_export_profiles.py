"""Exported folders against the documented rules of each consumer.

Every ``read_by_*`` refuses what that consumer refuses, and otherwise gives the updates it would apply, computed by its
own rule of scaling. The references are dense products of the adapters.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import hydraopt
from hydraopt.errors import BundleError

SHAPES = {
    "q_proj": (16, 16),
    "k_proj": (8, 16),
    "v_proj": (8, 16),
    "up_proj": (24, 16),
    "gate_proj": (24, 16),
}
DEFAULT_SHAPES = {"q_proj": (12, 16), "v_proj": (8, 16), "down_proj": (16, 24)}  # of the workshop


class RefusedByConsumerError(Exception):
    """The consumer would not load the folder, or would silently compute something else."""


def load(folder):
    return (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )


def pairs(tensors, endings=(("lora_A.weight", "lora_B.weight"),)):
    """A and B by module; any other tensor is refused, as all of these consumers do or ignore it silently."""
    found = {}
    for name, tensor in tensors.items():
        for ending in endings:
            for side in (0, 1):
                if name.startswith("base_model.model.") and name.endswith(f".{ending[side]}"):
                    module = name.removeprefix("base_model.model.").removesuffix(f".{ending[side]}")
                    found.setdefault(module, {})[side] = tensor
                    break
            else:
                continue
            break
        else:
            raise RefusedByConsumerError(f"{name} is unsupported LoRA weight")
    if any(len(sides) != 2 for sides in found.values()):
        raise RefusedByConsumerError("a module without one of its factors")
    return {module: (sides[0], sides[1]) for module, sides in found.items()}


def check_plain(config):
    for key in ("r", "lora_alpha", "target_modules", "base_model_name_or_path", "fan_in_fan_out"):
        if config.get(key) is None:
            raise RefusedByConsumerError(f"missing required configuration field {key}")
    if config["peft_type"] != "LORA" or config.get("use_dora") or config["bias"] != "none":
        raise RefusedByConsumerError("no plain LoRA")
    if config.get("modules_to_save") is not None:
        raise RefusedByConsumerError("only supports modules_to_save being None")
    if not isinstance(config["target_modules"], list):
        raise RefusedByConsumerError("target_modules is no list")


def uniform(config, factors):
    """One scaling, alpha / r, whatever the pattern says, and buffers of one rank."""
    scaling = config["lora_alpha"] / config["r"]
    for module, (a, b) in factors.items():
        if a.shape[0] != config["r"] or b.shape[1] != config["r"]:
            raise RefusedByConsumerError(f"{module} has rank {a.shape[0]}, the configuration {config['r']}")
    if config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise RefusedByConsumerError("patterns and rslora are not read")
    return {module: scaling * b.double() @ a.double() for module, (a, b) in factors.items()}


def check_every_layer(factors):
    """A target is in every layer, or its kind is dropped."""
    by_layer = {}
    for module in factors:
        layer = re.search(r"layers\.(\d+)\.", module)
        by_layer.setdefault(layer and layer.group(1), set()).add(module.rsplit(".", 1)[-1])
    if len({frozenset(targets) for targets in by_layer.values()}) > 1:
        raise RefusedByConsumerError("a target is missing in a layer")


def read_by_vllm(folder):
    config, tensors = load(folder)
    check_plain(config)
    factors = pairs(tensors, (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")))
    if config["r"] not in {1, 8, 16, 32, 64, 128, 256, 320, 512}:
        raise RefusedByConsumerError("no max_lora_rank")
    return uniform(config, factors)


def read_by_sglang(folder):
    config, tensors = load(folder)
    check_plain(config)
    factors = pairs(tensors)
    if any("layers." not in module for module in factors):
        raise RefusedByConsumerError("a module outside the layers")
    if any(not torch.isfinite(tensor.half()).all() for tensor in tensors.values()):
        raise RefusedByConsumerError("overflows float16")
    if any(tensor.dtype != torch.float16 for tensor in tensors.values()):
        raise RefusedByConsumerError("is cast to float16: numbers change on loading")
    parents = {module.rsplit(".", 1)[0] for module in factors}
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        for parent in parents:
            present = [f"{parent}.{name}" in factors for name in group]
            if any(present) and not all(present):
                raise RefusedByConsumerError(f"{parent} lacks some of {group}")
    return uniform(config, factors)


def read_by_lorax(folder):
    config, tensors = load(folder)
    check_plain(config)
    factors = pairs(tensors)
    if config["r"] > 128:
        raise RefusedByConsumerError("the decode kernel ends at rank 128")
    check_every_layer(factors)
    return uniform(config, factors)


def read_by_llama_cpp(folder):
    """The converter ends at any tensor it does not know; the scale is alpha over the tensor's own rank."""
    config, tensors = load(folder)
    if "lora_alpha" not in config or not config.get("base_model_name_or_path"):
        raise RefusedByConsumerError("lora_alpha or the base model is missing")
    factors = pairs(tensors)
    if any(tensor.dtype not in {torch.float32, torch.float16, torch.bfloat16} for tensor in tensors.values()):
        raise RefusedByConsumerError("dtype")
    updates = {}
    for module, (a, b) in factors.items():
        updates[module] = config["lora_alpha"] / a.shape[0] * b.double() @ a.double()
    if config.get("use_rslora") or config.get("alpha_pattern"):
        raise RefusedByConsumerError("rslora and alpha_pattern are ignored: the scale would be wrong")
    return updates


READERS = {
    "vllm": [read_by_vllm],
    "sglang": [read_by_sglang],
    "lorax": [read_by_lorax],
    "llama-cpp": [read_by_llama_cpp],
    "portable": [read_by_vllm, read_by_lorax, read_by_llama_cpp],
}


@pytest.fixture
def folders(workshop):
    """Tasks of unlike ranks and targets; one lacks a module in one layer."""
    return {
        "a": workshop.adapter("a", rank=3, shapes=SHAPES, use_rslora=True),
        "b": workshop.adapter(
            "b", seed=1, rank=9, shapes=SHAPES, skip=("model.layers.0.q_proj", "model.layers.1.up_proj"),
            alpha_pattern={"v_proj": 5},
        ),
    }  # fmt: skip


def expected(workshop, folders):
    adapters = {task: hydraopt.read_adapter(folder) for task, folder in folders.items()}
    return {
        task: {name: torch.linalg.multi_dot(adapter.factors(name, torch.float64)) for name in adapter.modules}
        for task, adapter in adapters.items()
    }


@pytest.mark.parametrize("profile", READERS)
def test_each_consumer_applies_the_updates_of_the_bundle(workshop, folders, profile, tmp_path):
    wanted = expected(workshop, folders)
    bundle = hydraopt.merge(folders, budget=1.0, dtype="float32")
    # float16 holds 11 bits: a rounding of each factor, and an update is a sum of nine products of two.
    tolerance = {"rtol": 0, "atol": 2e-2} if profile == "sglang" else {"rtol": 0, "atol": 1e-4}
    for task, folder in bundle.export(tmp_path / "out", profile=profile).items():
        for read in READERS[profile]:
            updates = read(folder)
            assert set(wanted[task]) <= set(updates)
            for name, update in updates.items():
                target = wanted[task].get(name, torch.zeros_like(update))
                torch.testing.assert_close(update, target, **tolerance)


@pytest.mark.parametrize(
    ("profile", "read"),
    [
        ("peft", read_by_vllm),  # a rank per module
        ("peft", read_by_lorax),
        ("peft", read_by_llama_cpp),  # alpha per module
        ("llama-cpp", read_by_vllm),
        ("llama-cpp", read_by_lorax),
        ("vllm", read_by_sglang),  # float32
        ("portable", read_by_sglang),
    ],
)
def test_the_wrong_profile_breaks_a_rule_of_the_consumer(folders, profile, read, tmp_path):
    """Each rule is one the checkers can see broken: no profile passes for all others by accident."""
    bundle = hydraopt.merge(folders, budget=0.6, dtype="float32")
    folder = bundle.export(tmp_path / "out", profile=profile)["b"]
    with pytest.raises(RefusedByConsumerError):
        read(folder)


def test_a_rank_beyond_the_kernel_is_refused(workshop, tmp_path):
    shapes = {"q_proj": (200, 180)}
    wide = workshop.adapter("wide", rank=140, layers=1, shapes=shapes)
    bundle = hydraopt.merge({"wide": wide}, budget=1.0)
    with pytest.raises(
        BundleError, match=r"'wide' has an update of rank 140; the profile 'lorax' ends at 128"
    ):
        bundle.export(tmp_path / "out", profile="lorax")
    assert read_by_vllm(bundle.export(tmp_path / "out", profile="vllm")["wide"])


@pytest.mark.parametrize(
    ("rank", "profile", "written"),
    [
        (1, "vllm", 1),
        (1, "portable", 8),
        (1, "lorax", 8),
        (8, "portable", 8),
        (8, "vllm", 8),
        (9, "portable", 16),
    ],
)
def test_a_rank_is_padded_to_the_next_the_consumer_knows_and_no_further(
    workshop, tmp_path, rank, profile, written
):
    folder = workshop.adapter("a", rank=rank, shapes={"q_proj": (16, 16)})
    bundle = hydraopt.merge({"a": folder}, method="separate", rank=rank, dtype="float32")
    adapter = hydraopt.read_adapter(bundle.export(tmp_path / "out", profile=profile)["a"])
    assert {module.rank for module in adapter.modules.values()} == {written}


def test_ranks_stay_small_where_a_consumer_takes_one_per_module(workshop, tmp_path):
    bundle = hydraopt.merge({"a": workshop.adapter("a", rank=9, shapes=SHAPES)}, budget=1.0)
    small, padded = (
        bundle.export(tmp_path / profile, profile=profile)["a"] / "adapter_model.safetensors"
        for profile in ("llama-cpp", "portable")
    )
    assert small.stat().st_size < 0.7 * padded.stat().st_size  # 9 of 16 rows, and the header


def test_ranks_that_differ_are_scaled_back_under_one_alpha(workshop, folders, tmp_path):
    """llama.cpp divides alpha by the rank of each tensor."""
    bundle = hydraopt.merge(folders, budget=0.6, dtype="float32")
    for task, folder in bundle.export(tmp_path / "out", profile="llama-cpp").items():
        adapter = hydraopt.read_adapter(folder)
        assert len({module.rank for module in adapter.modules.values()}) > 1
        stored = workshop.dense_bundle(bundle, task)
        for name, update in read_by_llama_cpp(folder).items():
            torch.testing.assert_close(update, stored[name], rtol=0, atol=1e-4)
            torch.testing.assert_close(
                torch.linalg.multi_dot(adapter.factors(name, torch.float64)), update, rtol=0, atol=1e-4
            )


def test_neighbours_nobody_updates_come_from_the_base_models_sizes(workshop, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=11,
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    shapes = {"self_attn.q_proj": (16, 16), "mlp.up_proj": (24, 16)}
    folder = workshop.adapter(
        "a",
        shapes=shapes,
        target_modules=["q_proj", "up_proj"],
        base_model_name_or_path=str(tmp_path / "base"),
    )
    bundle = hydraopt.merge({"a": folder}, budget=1.0)
    updates = read_by_sglang(bundle.export(tmp_path / "out", profile="sglang")["a"])
    assert updates["model.layers.1.self_attn.k_proj"].shape == (8, 16)
    assert not updates["model.layers.1.mlp.gate_proj"].any()


def test_numbers_that_float16_cannot_hold_are_refused(workshop, tmp_path):
    """Too large, or so small that nothing would be left."""
    for scale in (1e12, 1e-30):
        bundle = hydraopt.merge({"a": workshop.adapter("a", shapes=SHAPES, scale=scale)}, budget=1.0)
        with pytest.raises(BundleError, match=r"'sglang', task 'a'.*range of torch.float16"):
            bundle.export(tmp_path / "out", profile="sglang")
        hydraopt.read_adapter(bundle.export(tmp_path / f"{scale}")["a"]).check_finite()
    small = hydraopt.merge(
        {"a": workshop.adapter("b", shapes=SHAPES, scale=1e-30)}, dtype="float16", bits=4, budget=0.9
    )
    with pytest.raises(BundleError, match=r"task 'a': module .*range of torch.float16.*bfloat16"):
        small.export(tmp_path / "out")


def table(workshop):
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.randn(2, 11),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.randn(16, 2),
        "base_model.model.model.layers.0.q_proj.lora_A.weight": torch.randn(2, 16),
        "base_model.model.model.layers.0.q_proj.lora_B.weight": torch.randn(16, 2),
    }
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny/base", "r": 2, "lora_alpha": 2,
        "target_modules": ["embed_tokens", "q_proj"],
    }  # fmt: skip
    return workshop.write("table", config, tensors)


@pytest.mark.parametrize("profile", READERS)
def test_an_embedding_table_goes_where_it_is_read(workshop, profile, tmp_path):
    bundle = hydraopt.merge({"table": table(workshop)}, budget=1.0, dtype="float32")
    if profile == "vllm":
        assert "model.embed_tokens" in read_by_vllm(bundle.export(tmp_path / "out", profile=profile)["table"])
    else:
        with pytest.raises(BundleError, match=rf"'table' updates the embedding table .*{profile}"):
            bundle.export(tmp_path / "out", profile=profile)


def test_a_table_one_task_updates_is_left_alone_in_the_others(workshop, tmp_path):
    """Where a consumer wants every linear layer, a table is none."""
    plain = workshop.adapter("plain", layers=1, shapes={"q_proj": (16, 16)})
    bundle = hydraopt.merge({"plain": plain, "table": table(workshop)}, budget=1.0, dtype="float32")
    folder = bundle.export(tmp_path / "out", profile="vllm")["plain"]
    assert set(hydraopt.read_adapter(folder).modules) == {"model.layers.0.q_proj"}


def test_a_copy_of_the_base_models_table_is_refused_by_name(workshop, tmp_path):
    """PEFT saves one along whenever a table is targeted."""
    folder = table(workshop)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.base_layer.weight"] = torch.randn(11, 16)
    save_file(tensors, folder / "adapter_model.safetensors")
    bundle = hydraopt.merge({"table": folder}, budget=1.0)
    with pytest.raises(BundleError, match=r"'table' carries a copy of the base model's model\.embed_tokens"):
        bundle.export(tmp_path / "out", profile="vllm")


@pytest.mark.parametrize("profile", READERS)
def test_what_no_server_reads_is_refused_by_name(workshop, profile, tmp_path):
    dora = workshop.adapter(
        "dora", use_dora=True,
        extras={
            f"base_model.model.model.layers.{layer}.{name}.lora_magnitude_vector": torch.ones(shape[0])
            for layer in range(2) for name, shape in DEFAULT_SHAPES.items()
        },
    )  # fmt: skip
    head = workshop.adapter(
        "head", extras={"base_model.model.score.weight": torch.ones(2, 16)}, task_type="SEQ_CLS"
    )
    sizes = dict.fromkeys(("num_transformer_submodules", "num_attention_heads", "num_layers"), 1)
    config = {
        "peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny/base",
        "num_virtual_tokens": 3, "token_dim": 8, **sizes,
    }  # fmt: skip
    prompt = workshop.write("prompt", config, {"prompt_embeddings": torch.randn(3, 8)})
    for folder, reason in (
        (dora, "is a DoRA"),
        (head, "replaces score whole"),
        (prompt, r"is a prompt \(PROMPT_TUNING"),
    ):
        bundle = hydraopt.merge({folder.name: folder}, budget=1.0)
        with pytest.raises(
            BundleError, match=rf"task '{folder.name}' {reason}.*{profile}.*use the profile 'peft'"
        ):
            bundle.export(tmp_path / "out", profile=profile)
    assert not (tmp_path / "out").exists()
