"""Files from strangers: refused by name, in bounded memory and time, without running anything.

Each is read in a fork whose address space may grow by a fixed amount, so a header or an alias that unfolds is an error
here and not a machine out of memory. Tested elsewhere: pickles, lying lengths, NaN, names with ``..``
(tests/hydraopt: test_peft_folder.py, test_bundle.py); what is changed in a store (tests/integration:
test_device_pull.py, test_approvals.py, test_supply_chain.py, test_publishing.py); wrong keys and rights
(test_object_store.py, test_production_stack.py); ports and secrets of running servers (test_local_services.py,
test_production_stack.py).
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hydraopt
from hydraopt.errors import AdapterFormatError, BundleError, HydraoptError, TaskFileError
from hydraopt.evaluation.task_file import TaskFile

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))  # importlib mode adds no folder by itself

from tiny_adapters import write_adapter, write_bundle

MAY_GROW = 600 * 2**20  # bytes of address space: what the largest header that is read takes, and some room
MAY_COMPUTE_S = (
    30  # seconds of one core, after which the kernel ends the fork: that is a failure, not a limit we time
)
LONGEST_MESSAGE = 2000
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def refused(read) -> tuple[str, str]:
    """Class and message of the error that ``read`` raises under the limits."""
    answers, tell = os.pipe()
    child = os.fork()
    if child == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + MAY_GROW,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (MAY_COMPUTE_S,) * 2)
        try:
            said = ["accepted", repr(read())[:200]]
        except BaseException as error:  # noqa: BLE001 - the parent says which ones are right
            said = [type(error).__name__, str(error)[: LONGEST_MESSAGE + 1]]
        os.write(tell, json.dumps(said).encode())
        os._exit(0)
    os.close(tell)
    with os.fdopen(answers, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status == 0, "reading it took more memory or time than there is"
    return tuple(json.loads(said))


def check(read, error: type[HydraoptError], words: str) -> None:
    kind, message = refused(read)
    assert (kind, words in message) == (error.__name__, True), message
    assert len(message) <= LONGEST_MESSAGE


def entry(shape: list[int], begin: int, end: int) -> str:
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})


def header(*entries: tuple[str, str]) -> bytes:
    return ("{" + ",".join(f'"{name}":{value}' for name, value in entries) + "}").encode()


TWO = ((A, entry([4, 24], 0, 384)), (B, entry([24, 4], 384, 768)))
MANY = b"{" + b",".join(
    b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % number for number in range(290_000)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (header(TWO[0], (B, entry([24, 4], 192, 576))), "invalid offset"),  # overlap
        (header(TWO[0], (B, entry([24, 4], 400, 784))), "invalid offset"),  # a hole
        (header((A, entry([2**33, 2**33], 0, 384))), "overflow"),
        (header((A, entry([-4, -24], 0, 384))), "expected usize"),
        (header((A, entry([2**62, 0], 0, 0)), (B, entry([0, 2**62], 0, 0))), "not fully covered"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "recursion"),
        (header(*TWO, (A, entry([4, 24], 0, 384))), "stands twice"),
        (MANY + b"}" + b" " * 2_000_000, "at most 16000000"),
        (b"{" + b" " * 90_000_000 + b"}", "at most 16000000"),
    ],
    ids=["overlap", "hole", "overflow", "negative", "empty giant", "deep", "twice", "many names", "spaces"],
)
def test_a_lying_header_is_refused_in_bounded_memory(tmp_path, text, words):
    folder = write_adapter(tmp_path / "adapter", 1)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(768))
    check(lambda: hydraopt.read_adapter(folder), AdapterFormatError, words)


def test_as_many_tensors_as_a_large_mixture_of_experts_has_are_read(tmp_path):
    """The limit is above what exists: 128 experts of 94 layers make 72 192 tensors."""
    from hydraopt.adapters.tensor_file import TensorFile

    stem = "base_model.model.model.layers.{}.mlp.experts.{}.{}_proj.lora_{}.weight"
    names = [
        stem.format(layer, expert, part, side)
        for layer in range(94) for expert in range(128) for part in ("gate", "up", "down") for side in "AB"
    ]  # fmt: skip
    text = header(*((name, entry([0, 4096], 0, 0)) for name in names))
    (tmp_path / "file").write_bytes(struct.pack("<Q", len(text)) + text)
    assert refused(lambda: len(TensorFile(tmp_path / "file", AdapterFormatError).entries)) == (
        "accepted",
        "72192",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": "((("}, "another kind than PEFT writes"),
        ({"rank_pattern": {"((": 4}}, "another kind than PEFT writes"),
        ({"rank_pattern": {"q_proj": "x"}}, "another kind than PEFT writes"),
        ({"alpha_pattern": {"q_proj": [1]}}, "another kind than PEFT writes"),
        ({"lora_alpha": 10**400}, "another kind than PEFT writes"),
        ({"r": float("nan")}, "another kind than PEFT writes"),
        ({"r": 4.5}, "whole number"),
        ({"target_modules": "(([a-z0-9_.]+)+)+!"}, "does not name it"),  # Python's own library needs hours
        ({"modules_to_save": 5}, "another kind than PEFT writes"),
        ({"modules_to_save": [{"a": 1}]}, "another kind than PEFT writes"),
        ({"task_type": ["x"]}, "another kind than PEFT writes"),
        ({"revision": {"a": 1}}, "revision"),
        ({"thing": "x" * 9_000_000}, "unknown setting 'thing'"),
    ],
)
def test_a_setting_of_another_kind_is_refused_briefly(tmp_path, changes, words):
    folder = write_adapter(tmp_path / "adapter", 1)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    check(lambda: hydraopt.read_adapter(folder), AdapterFormatError, words)


@pytest.mark.parametrize("setting", ["target_modules", "rank_pattern"])
def test_a_pattern_that_takes_for_ever_is_refused(tmp_path, setting):
    """Twice as many ways for every letter more: no library finds out in time."""
    folder = write_adapter(tmp_path / "adapter", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name.replace("self_attn", "a" * 200): tensor for name, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    pattern = r"(\w|\w\w|\.)+[A-Z]"
    config = folder / "adapter_config.json"
    changed = {setting: pattern if setting == "target_modules" else {pattern: 4}}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))
    check(lambda: hydraopt.read_adapter(folder), AdapterFormatError, "takes more than")


@pytest.mark.parametrize(
    "text", [b"[" * 200_000 + b"]" * 200_000, b'{"recipe":' * 200_000 + b"1" + b"}" * 200_000]
)
def test_deep_json_is_no_configuration_and_no_manifest(tmp_path, text):
    folder = write_adapter(tmp_path / "adapter", 1)
    (folder / "adapter_config.json").write_bytes(text)
    check(lambda: hydraopt.read_adapter(folder), AdapterFormatError, "adapter_config.json")
    (tmp_path / "manifest.json").write_bytes(text)
    check(lambda: hydraopt.verify(tmp_path), BundleError, "manifest.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"r": 4, "r": 8}', "stands twice"),
        (b'{"r": "\\ud800"}', "surrogates not allowed"),
        (b'{"r": "\xed\xa0\x80"}', "invalid continuation byte"),
        (b'{"r": ' + b"[" * 101 + b"]" * 101 + b"}", "more than 100 levels deep"),
        (b'{"r": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[]", "expected a JSON object, found list"),
    ],
    ids=["twice", "half a character", "half in bytes", "deep", "long number", "list"],
)
def test_json_that_readers_would_not_agree_on_is_refused(tmp_path, text, words):
    folder = write_adapter(tmp_path / "adapter", 1)
    (folder / "adapter_config.json").write_bytes(text)
    check(lambda: hydraopt.read_adapter(folder), AdapterFormatError, words)


def test_a_manifest_of_a_hundred_megabytes_is_not_parsed(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'{"modules":[' + b"[]," * 30_000_000 + b"1]}")
    check(lambda: hydraopt.verify(tmp_path), BundleError, "is no manifest")


def move_out(path: Path, elsewhere: Path) -> None:
    """Leave a link where the file or folder was."""
    elsewhere.parent.mkdir(parents=True, exist_ok=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_an_adapter_folder_is_not_followed(tmp_path, name):
    """Else whoever sends a folder has us store what only we may read."""
    folder = write_adapter(tmp_path / "adapter", 1)
    move_out(folder / name, tmp_path / "private" / name)
    with pytest.raises(AdapterFormatError, match=f"{name} is a link that leads out"):
        hydraopt.read_adapter(folder)


def test_links_inside_a_folder_and_those_of_the_hubs_cache_are_followed(tmp_path):
    folder = write_adapter(tmp_path / "plain", 1)
    digest = hydraopt.read_adapter(folder).digest
    move_out(folder / "adapter_config.json", folder / "config.json")
    assert hydraopt.read_adapter(folder).digest == digest
    cached = write_adapter(tmp_path / "models--team--adapter" / "snapshots" / "abc", 1)
    for number, file in enumerate(sorted(cached.iterdir())):
        move_out(file, cached.parents[1] / "blobs" / f"{number:040x}")
    assert hydraopt.read_adapter(cached).digest == digest


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("manifest.json", "manifest.json is a link that leads out"),
        ("shared.safetensors", "shared.safetensors is a link that leads out"),
        ("tasks", "a.safetensors is a link that leads out"),
    ],
)
def test_a_link_out_of_a_bundle_is_not_followed(tmp_path, name, words):
    bundle = write_bundle(tmp_path, 1)
    hydraopt.verify(bundle)
    move_out(bundle / name, tmp_path / "private" / name)
    with pytest.raises(BundleError, match=words):
        hydraopt.verify(bundle)


@pytest.mark.parametrize("kind", ["link to a folder", "dead link", "pipe"])
def test_what_is_no_file_is_one_too_many_in_a_bundle(tmp_path, kind):
    bundle = write_bundle(tmp_path, 1)
    if kind == "pipe":
        os.mkfifo(bundle / "more")
    else:
        (bundle / "more").symlink_to(tmp_path if kind == "link to a folder" else tmp_path / "nothing")
    with pytest.raises(BundleError, match="'more' is not listed"):
        hydraopt.verify(bundle)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + level)}: &{chr(98 + level)} [{','.join(['*' + chr(97 + level)] * 9)}]\n"
    for level in range(12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS + "name: *m\n", "aliases"),
        (LAUGHS + "name: x\nlabels: *m\n", "aliases"),
        ("name: &a [*a]\n", "aliases"),
        ("name: " + "[" * 20_000 + "]" * 20_000, "recursion"),
        ("name: !!python/object/apply:os.system ['true']", "not YAML"),
        ("name: 1" + ":1" * 100_000, "a number has more than 100 characters"),
        ("name: 1" + ":1" * 400 + ".5", "a number has more than 100 characters"),
        ("name: 0x" + "f" * 200_000, "a number has more than 100 characters"),
        ("max_length: 1:1:1:1:1:1:1:1:1:1:1:1:1:1", "max_length"),
        ("a" * 300_000, "300,000 bytes is too large"),
        ("name: !!int ''", "this is no int"),
        ("name: !!bool maybe", "this is no bool"),
        ("name: !!timestamp now", "this is no timestamp"),
        ("name: !!set [1]", "expected a mapping"),
        ('name: "\\ud800"', "surrogates not allowed"),
    ],
    ids=[
        "laughs",
        "laughs in a list",
        "in itself",
        "deep",
        "code",
        "base 60",
        "with a point",
        "base 16",
        "short base 60",
        "large",
        "no int",
        "no bool",
        "no time",
        "no set",
        "half a character",
    ],
)
def test_yaml_that_unfolds_or_runs_is_refused(tmp_path, text, words):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    check(lambda: TaskFile.load(path), TaskFileError, words)
