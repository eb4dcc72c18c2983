"""An attached model in PEFT's own hands: saved, loaded into, combined; and a base that holds adapters already."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import hydraopt
from hydraopt.errors import BundleError

TOKENS = torch.arange(14).reshape(2, 7) % 11
TASKS = ("one", "two", "three", "four")
LINEAR = ("q_proj", "down_proj")
TABLE = "embed_tokens"
RECIPES = {
    "shared-a": {"budget": 0.35},
    "two-sided": {"budget": 0.35, "method": "two-sided"},
    "dense-heads": {"method": "paper", "rank": 4},
    "separate": {"method": "separate", "rank": 3},
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=11,
        )
    ).eval()


def trained(folder, targets, sides):
    """Adapters with one A on all of them, or with factors from one small space on both sides."""
    common: dict[str, torch.Tensor] = {}
    for seed, task in enumerate(TASKS):
        model = get_peft_model(llama(), LoraConfig(r=8, lora_alpha=8, target_modules=[*targets]))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                continue
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_a = ".lora_A." in name or ".lora_embedding_A." in name
            if is_a or sides == 2:
                first = common.setdefault(name, parameter.data)
                parameter.data = first if sides == 1 else first + 0.01 * parameter.data
        model.peft_config["default"].base_model_name_or_path = "tiny/base"
        model.save_pretrained(folder / task, save_embedding_layers=False)
    return {task: folder / task for task in TASKS}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """``adapters(targets, sides)``: folders, made once."""
    made: dict[tuple[object, ...], dict[str, object]] = {}

    def make(targets, sides):
        key = (targets, sides)
        if key not in made:
            made[key] = trained(tmp_path_factory.mktemp("adapters"), targets, sides)
        return made[key]

    return make


@pytest.fixture
def merged(adapters):
    """``merged(family, targets)``: a bundle of four tasks whose modules are of that family, some at least."""

    def merge(family, targets):
        folders = adapters(targets, 2 if family == "two-sided" else 1)
        bundle = hydraopt.merge(folders, dtype="float32", **RECIPES[family])
        assert family in {module.family for module in bundle.manifest.modules}
        return bundle, folders

    return merge


def logits_of(model) -> dict[str, torch.Tensor]:
    found = {}
    for task in TASKS:
        model.set_adapter(task)
        found[task] = model(TOKENS).logits
    return found


@torch.no_grad()
@pytest.mark.parametrize("family", RECIPES)
@pytest.mark.parametrize("packed", [False, True])
def test_what_peft_saves_computes_the_same(merged, family, packed, tmp_path):
    """Factors are multiplied in another order, in float32: rounding is all there is."""
    bundle, _ = merged(family, LINEAR if packed else (*LINEAR, TABLE))
    model = copy.deepcopy(bundle.attach(llama(), packed=packed))
    expected = logits_of(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    plain = llama()(TOKENS).logits
    for task, logits in expected.items():
        loaded = PeftModel.from_pretrained(llama(), tmp_path / task).eval()
        torch.testing.assert_close(loaded(TOKENS).logits, logits, rtol=0, atol=1e-5)
        assert not torch.allclose(logits, plain, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("family", RECIPES)
def test_the_state_of_one_attached_model_is_that_of_another(merged, family):
    """Saved by torch and loaded into a model of other numbers, every one."""
    bundle, _ = merged(family, (*LINEAR, TABLE))
    model, other = bundle.attach(llama()), bundle.attach(llama())
    for parameter in other.parameters():
        parameter.mul_(1.5)
    other.load_state_dict(model.state_dict())
    expected = logits_of(model)
    for task, logits in logits_of(other).items():
        torch.testing.assert_close(logits, expected[task], rtol=0, atol=1e-5)


def a_of(model) -> set[int]:
    """The distinct Parameters that hold A of one module."""
    (layer,) = (module for name, module in model.named_modules() if name.endswith(".down_proj"))
    return {id(layer.lora_A[task].weight) for task in TASKS}


@torch.no_grad()
def test_what_is_equal_for_all_tasks_stays_in_memory_once(merged):
    bundle, _ = merged("shared-a", LINEAR)
    model, other = bundle.attach(llama()), bundle.attach(llama())
    state = model.state_dict()
    for parameter in other.parameters():
        parameter.mul_(1.5)
    heads = [dict(one.named_parameters()) for one in (model, other)]
    model.load_state_dict(state)  # its own
    assert {name: id(one) for name, one in model.named_parameters()} == {
        name: id(one) for name, one in heads[0].items()
    }
    other.load_state_dict(state)
    assert len(a_of(model)) == len(a_of(other)) == 1
    bundle.attach(llama(), packed=True).load_state_dict(bundle.attach(llama(), packed=True).state_dict())


@torch.no_grad()
def test_a_head_that_is_loaded_goes_on_being_trained(merged, tmp_path):
    bundle, _ = merged("shared-a", LINEAR)
    model = bundle.attach(llama())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    model.set_adapter("one")
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained
    model.load_adapter(tmp_path / "two", "one", is_trainable=True)
    assert {name for name, one in model.named_parameters() if one.requires_grad} == trained


def test_every_task_is_saved_with_the_base_models_own_name(merged, tmp_path):
    bundle, _ = merged("shared-a", LINEAR)
    bundle.attach(llama()).save_pretrained(tmp_path, save_embedding_layers=False)
    assert {hydraopt.read_adapter(tmp_path / task).base_model for task in TASKS} == {"tiny/base"}


@torch.no_grad()
@pytest.mark.parametrize("family", RECIPES)
def test_an_adapter_loaded_in_place_of_a_task_changes_that_one_alone(merged, family, tmp_path):
    """What another model saved of the same bundle has the same sizes."""
    bundle, _ = merged(family, (*LINEAR, TABLE))
    bundle.attach(llama()).save_pretrained(tmp_path, save_embedding_layers=False)
    model = bundle.attach(llama())
    before = logits_of(model)
    model.load_adapter(tmp_path / "one", "one")  # equal numbers
    for task, logits in logits_of(model).items():
        torch.testing.assert_close(logits, before[task], rtol=0, atol=1e-5)
    changed = PeftModel.from_pretrained(llama(), tmp_path / "two", is_trainable=True)
    for name, parameter in changed.named_parameters():
        if "lora_" in name:
            parameter.mul_(1.1)
    changed.save_pretrained(tmp_path / "changed", save_embedding_layers=False)
    expected = before | {"two": changed.eval()(TOKENS).logits}
    assert not torch.allclose(expected["two"], before["two"], atol=1e-3)
    model.load_adapter(tmp_path / "changed", "two")
    for task, logits in logits_of(model).items():
        torch.testing.assert_close(logits, expected[task], rtol=0, atol=1e-5)


def test_an_adapter_of_another_rank_or_into_a_packed_model_is_not_loaded(merged, adapters, tmp_path):
    bundle, _ = merged("shared-a", LINEAR)
    bundle.attach(llama()).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(RuntimeError, match="attached packed"):
        bundle.attach(llama(), packed=True).load_adapter(tmp_path / "two", "one")
    other = hydraopt.merge(adapters(LINEAR, 1), method="separate", rank=2).export(tmp_path / "small")
    with pytest.raises(RuntimeError, match="size mismatch"):
        bundle.attach(llama()).load_adapter(other["one"], "one")


@torch.no_grad()
def test_peft_concatenates_attached_adapters_exactly(merged):
    """``cat`` puts factors beside one another, so that updates add up."""
    bundle, _ = merged("shared-a", LINEAR)
    model = bundle.attach(llama())
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "both", combination_type="cat")
    model.set_adapter("both")
    both = model(TOKENS).logits
    base = llama()
    weights = dict(base.named_parameters())
    for task, share in (("one", 1.0), ("two", 0.5)):
        for name, chain in bundle.factors(task).items():
            update = torch.linalg.multi_dot([part.double() for part in chain]) if len(chain) > 1 else chain[0]
            weights[f"{name}.weight"].add_(share * update)
    torch.testing.assert_close(both, base(TOKENS).logits, rtol=0, atol=1e-5)


def test_a_base_that_holds_an_adapter_of_that_name_is_refused(merged):
    bundle, _ = merged("shared-a", LINEAR)
    base = llama()
    with torch.no_grad():
        model = bundle.attach(base, tasks=["one", "two"])
        expected = model(TOKENS).logits
        with pytest.raises(BundleError, match=r"holds an adapter 'two' already.*unload.*'two-2': 'two'"):
            bundle.attach(base, tasks=["two", "three"])
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["training", "", "a.b", "update"])
def test_names_that_torch_takes_for_no_adapter_are_refused_with_another(merged, name):
    bundle, _ = merged("separate", LINEAR)
    with pytest.raises(BundleError, match=r"torch takes no adapter named.*tasks=\{'\S+-task': 'one'\}"):
        bundle.attach(llama(), tasks={name: "one"})
