"""Bundles on disk: whole, verified, deterministic; exported and attached without a change of meaning."""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

import hydraopt
from hydraopt.bundle.layout import canonical_json
from hydraopt.bundle.manifest_file import read_manifest
from hydraopt.errors import BundleError

TOKENS = torch.arange(14).reshape(2, 7) % 11


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=11,
        )
    ).eval()


def bert(labels: int) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=11,
        num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def trained(base, folder, seed, **config):
    """A PEFT adapter with random factors, saved by PEFT; returns its logits."""
    model = get_peft_model(base, LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.peft_config["default"].base_model_name_or_path = "tiny/base"
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(TOKENS).logits


CAUSAL = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 8, "use_rslora": True, "target_modules": r".*\.(q_proj|up_proj)"},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 16},
        "target_modules": ["q_proj", "v_proj"],
    },
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    logits = {
        task: trained(llama(), folder / task, seed, task_type="CAUSAL_LM", **config)
        for seed, (task, config) in enumerate(CAUSAL.items())
    }
    return {task: folder / task for task in CAUSAL}, logits


@torch.no_grad()
def test_attached_adapters_compute_what_they_computed_before(causal):
    folders, logits = causal
    model = hydraopt.merge(folders, budget=1.0, dtype="float32").attach(llama())
    for task, expected in logits.items():
        model.set_adapter(task)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("profile", ["peft", "portable"])
@pytest.mark.parametrize(
    "target", [{"budget": 0.6}, {"method": "paper", "rank": 3}, {"method": "separate", "rank": 1}]
)
def test_exported_folders_reload_in_peft_with_the_logits_of_the_bundle(causal, profile, target, tmp_path):
    folders, _ = causal
    bundle = hydraopt.merge(folders, dtype="float32", **target)
    attached = bundle.attach(llama())
    for task, folder in bundle.export(tmp_path / "out", profile=profile).items():
        attached.set_adapter(task)
        reloaded = PeftModel.from_pretrained(llama(), folder)
        torch.testing.assert_close(reloaded(TOKENS).logits, attached(TOKENS).logits, rtol=0, atol=1e-4)
        assert hydraopt.read_adapter(folder).base_model == "tiny/base"


@torch.no_grad()
def test_an_attached_task_can_be_merged_into_the_base(causal):
    folders, _ = causal
    bundle = hydraopt.merge(folders, budget=0.6, dtype="float32")
    model = bundle.attach(llama())
    model.set_adapter("rslora")
    expected = model(TOKENS).logits
    plain = model.merge_and_unload(adapter_names=["rslora"])
    torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_shared_rows_are_in_memory_once(workshop):
    shapes = {"self_attn.q_proj": (16, 16)}
    folders = {
        f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True, shapes=shapes, target_modules=["q_proj"])
        for i in range(3)
    }
    bundle = hydraopt.merge(folders, method="paper", rank=4)
    model = bundle.attach(llama())
    downs = [
        parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".lora_A." in name and "layers.0" in name
    ]
    assert len(downs) == 3
    assert len({parameter.data_ptr() for parameter in downs}) == 1
    assert not any(parameter.requires_grad for parameter in model.parameters())


@torch.no_grad()
def test_tasks_with_label_sets_of_different_size_live_in_one_model(tmp_path):
    labels = {"three": 3, "five": 5}
    logits = {
        task: trained(
            bert(count),
            tmp_path / task,
            count,
            task_type="SEQ_CLS",
            r=4,
            target_modules=["query", "output.dense"],
        )
        for task, count in labels.items()
    }
    bundle = hydraopt.merge({task: tmp_path / task for task in labels}, budget=1.0, dtype="float32")
    model = bundle.attach(bert(2))
    folders = bundle.export(tmp_path / "out")
    for task, expected in logits.items():
        model.set_adapter(task)
        torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)
        reloaded = PeftModel.from_pretrained(bert(labels[task]), folders[task]).eval()
        torch.testing.assert_close(reloaded(TOKENS).logits, expected, rtol=0, atol=1e-5)


def test_portable_folders_follow_the_rules_all_consumers_share(workshop, tmp_path):
    folders = {
        "a": workshop.adapter("a", rank=3),
        "b": workshop.adapter("b", seed=1, rank=9, skip=("model.layers.0.q_proj",)),
    }
    bundle = hydraopt.merge(folders, budget=1.0, dtype="float32")
    for task, folder in bundle.export(tmp_path / "out", profile="portable").items():
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        rank = {"a": 8, "b": 16}[task]
        assert (config["r"], config["lora_alpha"], config["bias"]) == (rank, rank, "none")
        for switch in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save"):
            assert not config[switch]
        assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
        # Both factors of every target in every layer, also where the task has none.
        assert len(tensors) == 2 * 6
        assert all(
            rank == (tensor.shape[0] if "lora_A" in name else tensor.shape[1])
            for name, tensor in tensors.items()
        )


@pytest.mark.parametrize("profile", ["peft", "portable"])
def test_an_exported_folder_names_the_revision_of_the_base_model(workshop, tmp_path, profile):
    folder = workshop.adapter("a", revision="v2")
    exported = hydraopt.merge({"a": folder}, budget=1.0).export(tmp_path / "out", profile=profile)["a"]
    assert hydraopt.read_adapter(exported).revision == "v2"


def test_portable_refuses_whole_layers_it_cannot_hold(workshop, tmp_path):
    extras = {"base_model.model.score.weight": torch.ones(2, 16)}
    bundle = hydraopt.merge({"a": workshop.adapter("a", extras=extras, task_type="SEQ_CLS")}, budget=1.0)
    with pytest.raises(BundleError, match="score"):
        bundle.export(tmp_path / "out", profile="portable")
    assert not (tmp_path / "out").exists()


def test_the_same_input_gives_the_same_bytes(workshop, tmp_path):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(3)}
    one = hydraopt.merge(folders, budget=0.5).save(tmp_path / "one")
    two = hydraopt.merge(folders, budget=0.5).save(tmp_path / "two")
    names = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    assert names == ["manifest.json", "shared.safetensors", *(f"tasks/t{i}.safetensors" for i in range(3))]
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


@pytest.fixture
def saved(workshop, tmp_path):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True) for i in range(2)}
    return hydraopt.merge(folders, budget=0.6).save(tmp_path / "bundle")


def test_a_loaded_bundle_is_the_saved_one(workshop, saved):
    bundle = hydraopt.Bundle.load(saved)
    assert hydraopt.verify(saved).id == bundle.id
    again = hydraopt.Bundle.load(bundle.save(saved.parent / "again"))
    assert again.id == bundle.id
    for task in bundle.task_names:
        for module, update in workshop.dense_bundle(bundle, task).items():
            assert torch.equal(update, workshop.dense_bundle(again, task)[module])


def test_every_changed_byte_is_noticed(saved):
    """A number changed in the manifest may still make sense, but then it is another bundle: its id says so."""
    bundle_id = hydraopt.verify(saved).id
    for file in sorted(path for path in saved.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            try:
                assert hydraopt.verify(saved).id != bundle_id
            except BundleError:
                continue
            assert file.name == "manifest.json"
        file.write_bytes(whole)
    assert hydraopt.verify(saved).id == bundle_id


def test_missing_and_stray_files_are_noticed(saved):
    (saved / "tasks" / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"tasks/extra\.safetensors"):
        hydraopt.verify(saved)
    (saved / "tasks" / "extra.safetensors").unlink()
    (saved / "tasks" / "t1.safetensors").unlink()
    with pytest.raises(BundleError, match=r"t1\.safetensors is missing"):
        hydraopt.verify(saved)


def test_a_manifest_that_names_a_path_outside_is_refused(saved):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"t1":', '"../t1":'))
    with pytest.raises(BundleError, match="task name"):
        hydraopt.verify(saved)


@pytest.mark.parametrize(("version", "way_out"), [(99, "Update hydraopt"), (1, "merge again")])
def test_a_manifest_of_another_version_is_refused(saved, version, way_out):
    text = (saved / "manifest.json").read_text()
    text = re.sub(r'"schema_version":\d+', f'"schema_version":{version}', text)
    for changed in (text, text.replace('"precisions"', '"another"')):  # with fields we know, and with others
        (saved / "manifest.json").write_text(changed)
        with pytest.raises(BundleError, match=f"schema {version}.*{way_out}"):
            hydraopt.verify(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [0, 24]},
        {"shared": [[4], [4]]},
        {"shared": [[4, 1]]},  # there is one precision
        {"shared": [[-4]]},
        {"heads": [[1], [1]]},
        {"heads": [[1], [0, 1], [1]]},
        {"heads": [[1], [-1], [1]]},
        {"groups": [0, 1]},
        {"groups": [-2, 0, 1]},
        {"groups": [0, 0, 2]},  # group 1 has nobody
        {"family": "shared-a"},  # has no groups
    ],
    ids=str,
)
def test_a_manifest_whose_module_does_not_hold_together_is_refused(workshop, tmp_path, change):
    """Three tasks in two groups, each group with one head; the bytes stay as hydraopt writes them."""
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True) for i in range(3)}
    path = hydraopt.merge(folders, method="paper", rank=4, heads=2).save(tmp_path / "bundle")
    value = json.loads((path / "manifest.json").read_text())
    module = value["modules"][0]
    assert (module["shape"], module["shared"], module["heads"]) == ([16, 24], [[4]], [[1], [1], [1]])
    assert sorted(module["groups"]) in ([0, 0, 1], [0, 1, 1])
    module |= change
    (path / "manifest.json").write_bytes(canonical_json(value))
    with pytest.raises(
        BundleError, match=r"'model.layers.0.down_proj' has shape .* which do not fit .* 3 tasks"
    ):
        read_manifest(path)


def test_a_manifest_of_a_precision_nobody_knows_is_refused(saved):
    value = json.loads((saved / "manifest.json").read_text())
    value["precisions"][1] = 5
    (saved / "manifest.json").write_bytes(canonical_json(value))
    with pytest.raises(BundleError, match=r"precision of 5 bits is not known\. Update"):
        read_manifest(saved)


def test_values_that_are_not_finite_are_noticed_even_with_right_digests(workshop):
    bundle = hydraopt.merge({"a": workshop.adapter("a")}, budget=1.0)
    bundle.contents.heads["a"][6:8] = torch.tensor([0xC0, 0x7F], dtype=torch.uint8)  # NaN as a bfloat16
    from hydraopt.bundle.tensor_bytes import describe

    entry = bundle.manifest.tasks["a"].model_copy(update={"file": describe(bundle.contents.encode_task("a"))})
    bundle.manifest = bundle.manifest.model_copy(update={"tasks": {"a": entry}})
    path = bundle.save(workshop.folder / "bundle")
    with pytest.raises(BundleError, match="NaN"):
        hydraopt.verify(path)


def test_saving_never_destroys_what_is_not_a_bundle(workshop, saved, tmp_path):
    bundle = hydraopt.Bundle.load(saved)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(BundleError, match="precious"):
        bundle.save(tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").exists()
    smaller = hydraopt.merge({"t0": workshop.adapter("t0", seed=9)}, budget=0.9)
    smaller.save(saved)  # a bundle may replace a bundle, and leaves no file of the former
    assert hydraopt.verify(saved).task_names == ("t0",)


@pytest.mark.parametrize("inside", ["thesis.txt", "notes/thesis.txt"])
def test_saving_never_destroys_what_lies_beside_a_bundle(workshop, saved, inside):
    (saved / inside).parent.mkdir(exist_ok=True)
    (saved / inside).write_text("three years")
    with pytest.raises(BundleError, match="thesis"):
        hydraopt.merge({"a": workshop.adapter("a2", seed=5)}, budget=1).save(saved)
    assert (saved / inside).read_text() == "three years"


def test_another_programs_manifest_makes_no_bundle(workshop, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(BundleError, match="not a bundle"):
        hydraopt.merge({"a": workshop.adapter("a2", seed=5)}, budget=1).save(site)
    assert [file.name for file in site.iterdir()] == ["manifest.json"]


def test_nothing_is_written_into_a_bundle(workshop, saved):
    bundle = hydraopt.Bundle.load(saved)
    for write in (lambda: bundle.save(saved / "inner"), lambda: bundle.export(saved)):
        with pytest.raises(BundleError, match="lies in the bundle"):
            write()
    hydraopt.verify(saved)


def test_links_that_lead_nowhere_and_the_own_folder_are_refused(saved, tmp_path, monkeypatch):
    bundle = hydraopt.Bundle.load(saved)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(BundleError, match="leads nowhere"):
        bundle.save(tmp_path / "link")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BundleError, match="the folder you are in"):
        bundle.save(".")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(BundleError, match="circle"):
        hydraopt.Bundle.load(tmp_path / "circle")


def test_an_export_replaces_an_earlier_one_and_no_trained_adapter(workshop, tmp_path):
    """Both hold the same two files; of several tasks none is written if one cannot be."""
    folders = {name: workshop.adapter(name, seed=i) for i, name in enumerate(("a", "b"))}
    bundle = hydraopt.merge(folders, budget=1)
    first = bundle.export(tmp_path / "out")
    before = {name: (folder / "adapter_model.safetensors").read_bytes() for name, folder in first.items()}
    assert bundle.export(tmp_path / "out") == first
    assert {
        name: (folder / "adapter_model.safetensors").read_bytes() for name, folder in first.items()
    } == before

    trained = folders["b"] / "adapter_model.safetensors"
    original = trained.read_bytes()
    elsewhere = tmp_path / "mixed"
    elsewhere.mkdir()
    folders["b"].rename(elsewhere / "b")
    with pytest.raises(BundleError, match="was not exported"):
        bundle.export(elsewhere)
    assert (elsewhere / "b" / trained.name).read_bytes() == original
    assert [folder.name for folder in elsewhere.iterdir()] == ["b"]


class NamesThatEndAlike(PreTrainedModel):
    """Two layers called ``fc``, one of them within a block."""

    config_class = PretrainedConfig

    def __init__(self):
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.fc = nn.Linear(24, 24)
        self.block = nn.ModuleDict({"fc": nn.Linear(24, 24), "layer": nn.Linear(24, 24)})

    def forward(self, x, **_):
        return self.block["layer"](torch.tanh(self.block["fc"](torch.tanh(self.fc(x)))))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "fc"},
        {"target_modules": ["fc", "layer"], "exclude_modules": ["block.fc"]},
        {"target_modules": ["fc", "layer"], "rank_pattern": {"^fc": 2}, "alpha_pattern": {"^fc": 6}},
        {"target_modules": ["fc", "layer"], "rank_pattern": {"block.fc": 2}},
    ],
    ids=["one of them", "one excluded", "a rank for the short name", "a rank for the long name"],
)
def test_a_module_whose_name_ends_like_anothers_stays_apart(settings, tmp_path):
    """Attached and exported, each computes what its adapter did: nothing but the modules it names changes. PEFT itself
    is the reference."""
    folders, x = {}, torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
    wanted = {}
    for seed, name in enumerate(("a", "b")):
        model = get_peft_model(NamesThatEndAlike(), LoraConfig(r=4, lora_alpha=8, **settings))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            wanted[name] = model.eval()(x)
        model.peft_config["default"].base_model_name_or_path = "tiny/base"
        model.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    bundle = hydraopt.merge(folders, budget=1, dtype="float32")
    exported = bundle.export(tmp_path / "out")
    for name, logits in wanted.items():
        for packed in (False, True):
            attached = bundle.attach(NamesThatEndAlike(), packed=packed)
            attached.set_adapter(name)
            torch.testing.assert_close(attached(x), logits, rtol=0, atol=1e-4)
        loaded = PeftModel.from_pretrained(NamesThatEndAlike(), exported[name]).eval()
        torch.testing.assert_close(loaded(x), logits, rtol=0, atol=1e-4)


def test_attaching_to_another_model_is_refused(causal):
    bundle = hydraopt.merge(causal[0], budget=0.6)
    with pytest.raises(BundleError, match="no linear module"):
        bundle.attach(bert(2))


def test_unknown_tasks_and_profiles_are_refused(saved, tmp_path):
    bundle = hydraopt.Bundle.load(saved)
    with pytest.raises(BundleError, match="no task 'nope'"):
        bundle.export(tmp_path / "out", task="nope")
    with pytest.raises(BundleError, match="profile"):
        bundle.export(tmp_path / "out", profile="gguf")


def test_a_bundle_with_a_renamed_pickle_is_refused(saved):
    file = saved / "tasks" / "t0.safetensors"
    save_file({"factors": torch.zeros(3)}, file)
    with pytest.raises(BundleError, match=r"has 84 bytes.*fetch the bundle again"):
        hydraopt.Bundle.load(saved)


@torch.no_grad()
@pytest.mark.parametrize(
    "target",
    [{"budget": 0.6}, {"budget": 0.7, "method": "two-sided"}, {"method": "paper", "rank": 3, "bits": 4}],
)
def test_packed_factors_compute_the_same_in_less_memory(tmp_path, target):
    """The same stored numbers are multiplied in another order: float32 rounding of a few products is all there is."""
    folders = {}
    for seed in range(3):
        trained(
            llama(),
            tmp_path / f"t{seed}",
            seed,
            task_type="CAUSAL_LM",
            r=4,
            target_modules=["q_proj", "up_proj"],
        )
        folders[f"t{seed}"] = tmp_path / f"t{seed}"
    bundle = hydraopt.merge(folders, **target)
    plain, packed = bundle.attach(llama()), bundle.attach(llama(), packed=True)
    for task in folders:
        plain.set_adapter(task)
        packed.set_adapter(task)
        torch.testing.assert_close(packed(TOKENS).logits, plain(TOKENS).logits, rtol=0, atol=1e-5)

    def adapter_bytes(model) -> int:
        tensors = [*model.named_parameters(), *model.named_buffers()]  # each shared one is counted once
        return sum(tensor.nbytes for name, tensor in tensors if ".lora_" in name)

    stored = bundle.contents.shared.nbytes + sum(head.nbytes for head in bundle.contents.heads.values())
    assert adapter_bytes(packed) <= stored < adapter_bytes(plain)
