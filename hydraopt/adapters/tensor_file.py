"""One safetensors file: checked when opened, read a tensor at a time, never unpickled.

The ``safetensors`` library validates the header. Tensors are then read with ``pread`` into private
memory: a memory map would count every page ever touched as resident, and a merge touches all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hydraopt.errors import HydraoptError
from hydraopt.json_text import parse_object

MAX_HEADER_BYTES = 16_000_000
"""About 100 000 tensors. The format allows 100 MB, which would take two gigabytes of memory once parsed."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    size: int  # bytes

    @property
    def numbers(self) -> int:
        """How many numbers the tensor holds."""
        return self.size // self.dtype.itemsize


class TensorFile:
    """A safetensors file whose header was checked; ``read`` gives one tensor in its own dtype.

    Args:
        path: The file.
        error: Class of the error to raise, so that an adapter and a bundle each say what they are.

    Raises:
        HydraoptError: Of the given class, if the file is missing, is no safetensors file (a renamed
            pickle, say), is cut short, or holds a dtype that is not a plain number.
    """

    def __init__(self, path: Path, error: type[HydraoptError]) -> None:
        self.path = path
        self._error = error
        self.head, self.entries = _read_header(path, error)

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU, in the file's dtype, in memory of its own."""
        return self.read_all((name,))[name]

    def read_all(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors, each as :meth:`read` gives it; neighbours in the file are read at once and share memory."""
        entries = sorted(((name, self.entries[name]) for name in names), key=lambda pair: pair[1].begin)
        spans: list[list[tuple[str, TensorEntry]]] = []
        for name, entry in entries:
            if (
                spans
                and _end(spans[-1]) == entry.begin
                and not _offset(spans[-1], entry) % entry.dtype.itemsize
            ):
                spans[-1].append((name, entry))
            else:
                spans.append([(name, entry)])
        tensors = {}
        with self.path.open("rb", buffering=0) as file:
            for span in spans:
                begin = span[0][1].begin
                file.seek(begin)
                data = self._read_bytes(file, _end(span) - begin, span[0][0])
                for name, entry in span:
                    part = data[entry.begin - begin :][: entry.size]
                    tensors[name] = part.view(entry.dtype).view(entry.shape)
        return tensors

    def _read_bytes(self, file: FileIO, size: int, name: str) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8)
        view, got = buffer.numpy().data, 0
        while got < size:
            count = file.readinto(view[got:])
            if not count:
                raise self._error(f"{self.path}: the file was cut short while {name!r} was read")
            got += count
        return buffer


def _end(span: Sequence[tuple[str, TensorEntry]]) -> int:
    return span[-1][1].begin + span[-1][1].size


def _offset(span: Sequence[tuple[str, TensorEntry]], entry: TensorEntry) -> int:
    return entry.begin - span[0][1].begin


def _read_header(path: Path, error: type[HydraoptError]) -> tuple[bytes, dict[str, TensorEntry]]:
    """The bytes before the tensors, and where each of these lies."""
    if not path.is_file():
        raise error(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        fits = size >= 8 and length <= min(MAX_HEADER_BYTES, size - 8)
        header = file.read(length) if fits else b""
    # A length may begin like a pickle (2688 is 80 0a ...): only what is no safetensors file is called one.
    if header[:1] != b"{":
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise error(
                f"{path}: this is a pickle with another name, not safetensors; it was not opened. {_SAVE_AGAIN}"
            )
        raise error(
            f"{path}: not a safetensors file (its header claims {length} of {size} bytes; at most {MAX_HEADER_BYTES} "
            f"are read). {_SAVE_AGAIN}"
        )
    try:
        with safe_open(path, framework="pt"):
            pass  # the library checks offsets, overlaps and shapes against the file's length
    except (SafetensorError, ValueError, RuntimeError, OSError) as reason:
        raise error(f"{path}: not a whole safetensors file ({reason}). {_SAVE_AGAIN}") from reason
    entries = parse_object(header, f"{path}: its header", error)
    entries.pop("__metadata__", None)
    return start + header, {
        name: _entry(path, name, value, 8 + length, error) for name, value in sorted(entries.items())
    }


_SAVE_AGAIN = "Save it again with `save_pretrained(..., safe_serialization=True)`."


def _entry(
    path: Path, name: str, value: dict[str, object], base: int, error: type[HydraoptError]
) -> TensorEntry:
    dtype = _DTYPES.get(str(value["dtype"]))
    if dtype is None:
        raise error(f"{path}: tensor {name!r} has dtype {value['dtype']}, which is not supported")
    offsets = value["data_offsets"]
    shape = value["shape"]
    if not isinstance(offsets, list) or not isinstance(shape, list):
        raise error(f"{path}: tensor {name!r} has a malformed header entry")
    begin, end = offsets
    return TensorEntry(dtype, tuple(shape), base + begin, end - begin)
