"""The bytes of a safetensors file as a header and the tensors' own memory: hashed and written without a copy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import safetensors.torch
import torch
from torch import Tensor

from hydraopt.bundle.layout import FileEntry

_ALIGNMENT = 8
_LENGTH_BYTES = 8


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> list[memoryview]:
    """The parts whose bytes, one after the other, are those that ``safetensors.torch.save`` gives.

    Args:
        tensors: By name, on the CPU. The parts look into their memory where they are contiguous.
        metadata: Of the file, written in this order: the library has another one every time.
    """
    # The library itself decides the order and the spelling: its header of empty tensors lacks nothing but sizes.
    empty = safetensors.torch.save({name: tensor.new_empty(0) for name, tensor in tensors.items()})
    length = int.from_bytes(empty[:_LENGTH_BYTES], "little")
    header = json.loads(empty[_LENGTH_BYTES : _LENGTH_BYTES + length])
    begin, parts = 0, []
    for name, entry in header.items():
        tensor = tensors[name]
        entry["shape"] = list(tensor.shape)
        entry["data_offsets"] = [begin, begin + tensor.nbytes]
        begin += tensor.nbytes
        if tensor.nbytes:
            parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    if metadata:
        header = {"__metadata__": dict(metadata), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return [memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text), *parts]


def describe(parts: Iterable[memoryview]) -> FileEntry:
    """Digest and length of a file's bytes."""
    digest, length = hashlib.sha256(), 0
    for part in parts:
        digest.update(part)
        length += part.nbytes
    return FileEntry(sha256=digest.hexdigest(), bytes=length)
