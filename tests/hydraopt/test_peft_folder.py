"""Reading PEFT folders: exactly what PEFT computes, or refused by name."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hydraopt
from hydraopt.errors import AdapterFormatError

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj"]},
    "regex": {"r": 2, "lora_alpha": 5, "target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "all-linear": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7},
    },
    "patterns and rslora": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 1},
    },
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=11
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", CONFIGS)
def test_updates_equal_those_of_peft(kind, tmp_path):
    """PEFT's own get_delta_weight is the reference for scaling, patterns and targets."""
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **CONFIGS[kind]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.peft_config["default"].base_model_name_or_path = "tiny/llama"
    model.save_pretrained(tmp_path / "adapter")

    adapter = hydraopt.read_adapter(tmp_path / "adapter")

    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert set(adapter.modules) == set(expected)
    for name, update in expected.items():
        up, down = adapter.factors(name, torch.float64)
        # PEFT multiplies in float32: a few eps of that.
        torch.testing.assert_close((up @ down).float(), update.detach(), rtol=1e-5, atol=1e-5)


def test_digest_follows_what_is_computed_not_how_it_is_stored(workshop):
    first = hydraopt.read_adapter(workshop.adapter("a", seed=1))
    same = hydraopt.read_adapter(workshop.adapter("b", seed=1, lora_dropout=0.3))
    other_alpha = hydraopt.read_adapter(workshop.adapter("c", seed=1, lora_alpha=9))
    other_base = hydraopt.read_adapter(workshop.adapter("d", seed=1, base_model_name_or_path="other/base"))
    other_values = hydraopt.read_adapter(workshop.adapter("e", seed=2))
    assert first.digest == same.digest
    assert len({first.digest, other_alpha.digest, other_base.digest, other_values.digest}) == 4


def test_settings_that_change_what_is_computed_change_the_digest(workshop):
    changes = [{}, {"revision": "v2"}, {"task_type": "SEQ_2_SEQ_LM"}, {"fan_in_fan_out": True}]
    digests = {
        hydraopt.read_adapter(workshop.adapter(f"a{i}", **change)).digest for i, change in enumerate(changes)
    }
    assert len(digests) == len(changes)


def test_projections_that_follow_from_a_key_are_told_apart_by_it(workshop):
    """The two files are equal: projections are not saved."""
    tensors = {
        f"base_model.model.q_proj.vera_lambda_{side}": torch.ones(size) for side, size in (("b", 8), ("d", 4))
    }
    config = {
        "peft_type": "VERA",
        "base_model_name_or_path": "tiny/base",
        "r": 4,
        "target_modules": ["q_proj"],
    }
    digests = {
        hydraopt.read_adapter(
            workshop.write(
                f"v{key}", config | {"projection_prng_key": key, "save_projection": False}, tensors
            )
        ).digest
        for key in (0, 1)
    }
    assert len(digests) == 2


def test_equal_bytes_are_told_apart_by_name_shape_and_dtype(workshop):
    """A whole layer's bytes alone do not say which layer they replace, nor what numbers they are."""
    head = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).half()
    extras = [
        ("lm_head", head),
        ("head", head),
        ("lm_head", head.reshape(16, 3)),
        ("lm_head", head.view(torch.bfloat16)),
    ]
    digests = set()
    for place, (name, tensor) in enumerate(extras):
        folder = workshop.adapter(
            f"a{place}",
            extras={f"base_model.model.{name}.weight": tensor},
            modules_to_save=["lm_head", "head"],
        )
        digests.add(hydraopt.read_adapter(folder).digest)
    assert len(digests) == len(extras)


def test_reference_bytes_count_two_a_number_whatever_the_file_holds(workshop):
    wide = workshop.adapter("wide", dtype=torch.float32)
    narrow = workshop.adapter("narrow", dtype=torch.bfloat16)
    numbers = 2 * sum(4 * (d_out + d_in) for d_out, d_in in ((12, 16), (8, 16), (16, 24)))
    expected = 2 * numbers + (wide / "adapter_config.json").stat().st_size
    assert hydraopt.read_adapter(wide).reference_bytes == expected
    assert hydraopt.read_adapter(narrow).reference_bytes == expected


@pytest.mark.parametrize(
    ("setting", "value", "word"),
    [
        ("use_dora", True, "magnitude"),
        ("lora_bias", True, "bias"),
        ("bias", "all", "bias"),
        ("kasa_config", {"a": 1}, "KaSA"),
        ("layer_replication", [[0, 2]], "replicated"),
        ("init_lora_weights", "pissa_niter_4", "path_initial_model_for_weight_conversion"),
        ("some_new_switch", True, "some_new_switch"),
        ("peft_type", "IA3", "IA3.*multiplies"),
        ("peft_type", "LOHA", "elementwise product"),
        ("peft_type", "LOKR", "Kronecker"),
        ("peft_type", "OFT", "rotates"),
        ("peft_type", "XLORA", "gate"),
        ("peft_type", "TRAINABLE_TOKENS", "token rows"),
        ("peft_type", "SOMETHING_NEW", "SOMETHING_NEW.*supported are LORA"),
        ("peft_type", None, "None"),
        ("base_model_name_or_path", None, "base_model_name_or_path"),
        ("r", "four", "number"),
        ("r", 5, "rank 5"),
        ("target_modules", ["k_proj"], "target_modules"),
        ("target_modules", ["proj"], "target_modules"),  # a part of a name is no target
    ],
)
def test_what_cannot_be_read_exactly_is_refused_by_name(workshop, setting, value, word):
    folder = workshop.adapter("a", **{setting: value})
    with pytest.raises(AdapterFormatError, match=word) as error:
        hydraopt.read_adapter(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("name", ["module.model.layers", "_orig_mod.model.layers", "model.layers._orig_mod"])
def test_names_from_inside_a_wrapper_are_refused(workshop, name):
    """PEFT would warn, and load nothing."""
    folder = workshop.adapter("a")
    file = folder / "adapter_model.safetensors"
    save_file({key.replace("model.layers", name): tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(AdapterFormatError, match=r"inside a wrapper.*save the model that was wrapped"):
        hydraopt.read_adapter(folder)


def test_what_weight_tying_adds_is_refused_with_its_name(workshop):
    folder = workshop.adapter("a", ensure_weight_tying=True, target_modules=["k_proj"])
    with pytest.raises(AdapterFormatError, match="ensure_weight_tying adds it"):
        hydraopt.read_adapter(folder)
    extra = {"base_model.model.model.embed_tokens.weight": torch.zeros(4, 4)}
    folder = workshop.adapter("b", ensure_weight_tying=True, extras=extra)
    with pytest.raises(AdapterFormatError, match="ensure_weight_tying adds it"):
        hydraopt.read_adapter(folder)


def test_pickled_weights_are_refused_unopened(workshop, tmp_path):
    """Opening either file as a pickle would create the marker."""
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    folder = workshop.adapter("a")
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(AdapterFormatError, match="pickle"):
        hydraopt.read_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match=r"adapter_model.bin.*pickled"):
        hydraopt.read_adapter(folder)
    assert not marker.exists()


@pytest.mark.parametrize("length", [0x0A80, 0x4B50])
def test_a_header_whose_length_begins_like_a_pickle_is_read(workshop, length):
    """0x80 opens a pickle, "PK" a zip; a safetensors file begins with the length of its header, low byte first."""
    file = workshop.adapter("a") / "adapter_model.safetensors"
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    file.write_bytes(length.to_bytes(8, "little") + data[8:end].ljust(length) + data[end:])
    again = hydraopt.read_adapter(file.parent)
    assert again.digest == hydraopt.read_adapter(workshop.adapter("b")).digest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(workshop, value):
    folder = workshop.adapter("a", extras={})
    adapter = hydraopt.read_adapter(folder)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.q_proj.lora_B.weight"
    tensors[name][2, 1] = value
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterFormatError, match=r"layers\.1\.q_proj\.lora_B"):
        adapter.check_finite()
    with pytest.raises(AdapterFormatError, match="NaN or infinite"):
        hydraopt.merge({"a": folder}, budget=0.9)


def test_broken_folders_are_named(workshop, tmp_path):
    with pytest.raises(AdapterFormatError, match="no such folder"):
        hydraopt.read_adapter(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is missing"):
        hydraopt.read_adapter(tmp_path / "empty")
    folder = workshop.adapter("a")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFormatError, match="not JSON"):
        hydraopt.read_adapter(folder)
    folder = workshop.adapter("b")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(AdapterFormatError, match="safetensors"):
        hydraopt.read_adapter(folder)


@pytest.mark.parametrize("length", [2**62, 200_000_000, 7])
def test_a_lying_header_length_is_refused_without_reading_it(workshop, length):
    folder = workshop.adapter("a")
    (folder / "adapter_model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 20)
    with pytest.raises(AdapterFormatError, match="safetensors"):
        hydraopt.read_adapter(folder)


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ("base_model.model.model.embed_tokens.weight", "embed_tokens"),
        ("base_model.model.model.layers.0.q_proj.lora_magnitude_vector", "magnitude"),
        ("model.layers.0.q_proj.lora_A.weight", "does not start with"),
        ("base_model.model.model.layers.0.o_proj.lora_A.weight", "no matching lora_B"),
        ("base_model.model.model.layers.0.o_proj.lora_B.weight", "no matching lora_A"),
    ],
)
def test_tensors_nobody_asked_for_are_refused_not_dropped(workshop, extra, word):
    folder = workshop.adapter("a", extras={extra: torch.zeros(4, 4)})
    with pytest.raises(AdapterFormatError, match=word):
        hydraopt.read_adapter(folder)


def test_a_rank_that_is_no_number_is_refused(workshop):
    """``true`` equals 1 in Python, and the factors do have rank 1."""
    with pytest.raises(AdapterFormatError, match="r is True; expected a number"):
        hydraopt.read_adapter(workshop.adapter("a", rank=1, r=True, lora_alpha=2))


@pytest.mark.parametrize(("factor", "axis"), [("lora_A", 0), ("lora_B", 1)])
def test_a_factor_of_another_rank_than_its_partner_is_refused(workshop, factor, axis):
    name = f"base_model.model.model.layers.1.q_proj.{factor}.weight"
    shape = [12, 4] if factor == "lora_B" else [4, 16]
    shape[axis] += 1
    folder = workshop.adapter("a", extras={name: torch.ones(shape)})
    with pytest.raises(AdapterFormatError, match=r"layers\.1\.q_proj.*rank 4"):
        hydraopt.read_adapter(folder)


def test_a_magnitude_without_a_direction_is_refused(workshop):
    sizes = {"q_proj": 12, "o_proj": 16}
    magnitudes = {
        f"base_model.model.model.layers.0.{name}.lora_magnitude_vector": torch.ones(size)
        for name, size in sizes.items()
    }
    folder = workshop.adapter("a", layers=1, shapes={"q_proj": (12, 16)}, use_dora=True, extras=magnitudes)
    with pytest.raises(AdapterFormatError, match=r"o_proj.*magnitude of a module without"):
        hydraopt.read_adapter(folder)


def test_modules_to_save_are_extras(workshop):
    head = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    folder = workshop.adapter(
        "a", extras={"base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"]
    )
    adapter = hydraopt.read_adapter(folder)
    assert adapter.extras == ("base_model.model.lm_head.weight",)
    assert adapter.saved_modules == ("lm_head",)
    assert torch.equal(adapter.extra("base_model.model.lm_head.weight"), head)


def test_configuration_is_read_as_json_not_as_code(workshop):
    folder = workshop.adapter("a", auto_mapping={"base_model_class": "X", "parent_library": "os"})
    assert json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]
    assert hydraopt.read_adapter(folder).modules  # read, and nothing of it imported
