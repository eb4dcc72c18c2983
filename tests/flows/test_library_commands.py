"""The library's commands on adapters of several kinds, as a user types them."""

import errno
import json
import re

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from flows.command_line import main


@pytest.fixture
def adapters(tmp_path):
    """A VeRA and a prompt, saved as PEFT saves them."""
    generator = torch.Generator().manual_seed(0)
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny/base"}
    vera = {
        "peft_type": "VERA",
        "r": 4,
        "projection_prng_key": 3,
        "save_projection": False,
        "target_modules": ["q"],
    }
    sizes = {"num_transformer_submodules": 1, "num_attention_heads": 2, "num_layers": 2}
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "token_dim": 8, **sizes}
    vectors = {
        "base_model.model.layers.0.q.vera_lambda_b": 16,
        "base_model.model.layers.0.q.vera_lambda_d": 4,
    }
    tensors = {
        "vectors": {name: torch.randn(length, generator=generator) for name, length in vectors.items()},
        "tokens": {"prompt_embeddings": torch.randn(5, 8, generator=generator)},
    }
    for name, config in (("vectors", vera), ("tokens", prompt)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(common | config))
        save_file(tensors[name], tmp_path / name / "adapter_model.safetensors")
    return {name: tmp_path / name for name in tensors}


def run(*args):
    result = CliRunner().invoke(main, [*map(str, args), "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_inspect_shows_the_kind_and_what_the_updates_are_added_to(adapters, tmp_path):
    code, found = run("inspect", adapters["vectors"])
    assert (code, found["kind"], found["settings"]["projection_prng_key"]) == (0, "VERA", 3)
    assert found["modules"]["layers.0.q.vera_lambda_b"]["layer"] == "vector"
    code, found = run("inspect", adapters["tokens"])
    assert (code, found["kind"], found["settings"]["num_virtual_tokens"]) == (0, "PROMPT_TUNING", 5)
    assert found["modules"]["prompt_embeddings.5x8"] == {
        "shape": [5, 8],
        "layer": "prompt",
        "rank": 5,
        "scaling": 1.0,
    }

    assert (
        run("merge", *adapters.values(), "--budget", 1, "--dtype", "float32", "--out", tmp_path / "bundle")[0]
        == 0
    )
    code, found = run("inspect", tmp_path / "bundle")
    assert code == 0
    assert {task: entry["kind"] for task, entry in found["tasks"].items()} == {
        "vectors": "VERA",
        "tokens": "PROMPT_TUNING",
    }


def test_export_writes_kinds_back_and_names_what_a_server_cannot_read(adapters, tmp_path):
    assert (
        run("merge", *adapters.values(), "--budget", 1, "--dtype", "float32", "--out", tmp_path / "bundle")[0]
        == 0
    )
    code, found = run("export", tmp_path / "bundle", "--out", tmp_path / "out")
    assert code == 0
    for task, folder in found["folders"].items():
        written, original = (
            load_file(f"{place}/adapter_model.safetensors") for place in (folder, adapters[task])
        )
        assert written.keys() == original.keys()
        for name, tensor in original.items():
            torch.testing.assert_close(written[name], tensor, rtol=1e-5, atol=1e-6)
    code, found = run(
        "export", tmp_path / "bundle", "--out", tmp_path / "vllm", "--task", "tokens", "--profile", "vllm"
    )
    assert code == 2
    assert "PROMPT_TUNING" in found["error"]
    assert run("export", tmp_path / "bundle", "--out", tmp_path / "x", "--profile", "gguf")[0] == 2


def test_merge_keeps_a_former_bundles_shared_part(adapters, tmp_path):
    settings = ["--budget", 1, "--dtype", "float32"]
    assert run("merge", *adapters.values(), *settings, "--out", tmp_path / "former")[0] == 0
    tensors = load_file(adapters["vectors"] / "adapter_model.safetensors")
    save_file(
        {name: 2 * tensor for name, tensor in tensors.items()},
        adapters["vectors"] / "adapter_model.safetensors",
    )
    kept = ["--keep-shared", tmp_path / "former", "--out", tmp_path / "next"]
    code, found = run("merge", *adapters.values(), *kept)
    assert (code, found["warnings"]) == (0, [])
    before, after = (
        {f.name: f.read_bytes() for f in (tmp_path / n).rglob("*.*")} for n in ("former", "next")
    )
    assert {name for name in before if before[name] != after[name]} == {
        "manifest.json",
        "vectors.safetensors",
    }
    assert found["tasks"]["vectors"]["relative_error"] < 1e-6
    code, found = run("merge", *adapters.values(), *kept, "--dtype", "float16")
    assert (code, "contradicts" in json.dumps(found)) == (2, True)


@pytest.mark.parametrize("suffix", ["png", "html"])
def test_frontier_tells_and_draws_what_every_method_comes_to(suffix, tmp_path):
    """Smaller is worse within every method; the picture is what its name says and needs nothing from elsewhere."""
    folders = [lora(tmp_path / name, seed) for seed, name in enumerate(("mood", "topic"))]
    code, found = run("frontier", *folders, "--plot", tmp_path / f"frontier.{suffix}")
    assert code == 0
    assert found["seconds"] > 0
    assert found["peak_rss_bytes"] > 1 << 20
    methods = {(point["method"], point["bits"]) for point in found["points"]}
    assert methods >= {("hydraopt", "auto"), ("separate", 16), ("paper", 16)}
    for line in methods:
        own = [point for point in found["points"] if (point["method"], point["bits"]) == line]
        assert [point["budget"] for point in own] == sorted(point["budget"] for point in own)
        assert [point["relative_error"] for point in own] == sorted(
            (point["relative_error"] for point in own), reverse=True
        )
    drawn = (tmp_path / f"frontier.{suffix}").read_bytes()
    if suffix == "png":
        assert drawn.startswith(b"\x89PNG")
    else:
        assert b"<html" in drawn[:1000].lower()
        assert not re.search(rb"<(script|link)[^>]*(src|href)=", drawn)


def test_a_picture_of_another_kind_is_refused_before_the_work(tmp_path):
    code, found = run("frontier", lora(tmp_path / "mood", 0), "--plot", tmp_path / "frontier.jpg")
    assert (code, found["kind"]) == (2, "PlotError")


def test_weights_and_names_that_cannot_be_meant_are_refused(tmp_path):
    mood = lora(tmp_path / "mood", 0)
    for arguments, said in (
        ([mood, "--weights", "mood=1", "--weights", "mood=2"], "twice"),
        (["mood="], "names no folder"),
    ):
        code, found = run("merge", *arguments, "--out", tmp_path / "bundle")
        assert code == 2
        assert said in found["error"]


def test_an_adapter_is_named_by_its_folder_or_as_it_is_told(tmp_path):
    """A link by its own name: where it leads may be one of many called `checkpoint-500`."""
    lora(tmp_path / "checkpoint-500", 0)
    for name in ("mood", "topic"):
        (tmp_path / name).symlink_to(tmp_path / "checkpoint-500")
    given = [tmp_path / "mood", tmp_path / "checkpoint-500" / ".." / "topic", f"other={tmp_path / 'topic'}"]
    code, found = run("merge", *given, "--out", tmp_path / "bundle")
    assert (code, sorted(found["tasks"])) == (0, ["mood", "other", "topic"])


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    """Root may write to any folder but on a disk that takes nothing."""
    mood = lora(tmp_path / "mood", 0)
    monkeypatch.setattr("hydraopt.merge", None)
    code, found = run("merge", mood, "--out", mood)
    assert (code, "is not a bundle" in found["error"]) == (2, True)
    monkeypatch.setattr("os.access", lambda place, _mode: place != tmp_path)
    code, found = run("merge", mood, "--out", tmp_path / "new" / "bundle")
    assert (code, found["error"]) == (
        2, f"{tmp_path / 'new' / 'bundle'}: nothing can be written in {tmp_path}; choose another place"
    )  # fmt: skip


def test_a_full_disk_says_for_what(tmp_path, monkeypatch):
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, found = run("merge", lora(tmp_path / "mood", 0), "--out", tmp_path / "bundle")
    assert code == 2
    assert re.search(r"bundle.*\.safetensors: No space left on device", found["error"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mood"]


def test_inspect_compares_adapters_whose_headers_outweigh_them(adapters, tmp_path):
    code, found = run("inspect", adapters["vectors"], lora(tmp_path / "mood", 0))
    assert (code, found["what"]) == (0, "set")


def test_what_the_system_says_of_a_place_is_no_fault_of_ours(tmp_path):
    (tmp_path / "file").write_text("text")
    for out in (tmp_path / "file" / "bundle", tmp_path / ("x" * 300)):
        code, found = run("merge", lora(tmp_path / "mood", 0), "--out", out)
        assert code == 2
        assert str(tmp_path) in found["error"]
        assert "unexpected" not in found["error"]


def lora(folder, seed, rank=8, size=256):
    """A LoRA on two modules."""
    generator = torch.Generator().manual_seed(seed)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny/base",
        "r": rank,
        "lora_alpha": 16,
        "target_modules": ["q", "v"],
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {"lora_A": (rank, size), "lora_B": (size, rank)}
    tensors = {
        f"base_model.model.layers.0.{module}.{side}.weight": torch.randn(*shape, generator=generator)
        for module in ("q", "v")
        for side, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
