"""How a stored vector's numbers are written: as 32- or 16-bit floats, or in 8, 6, 4, 3 or 2 bits.

A low-bit vector is cut into groups of 128 numbers along its length (the long side of its factor). A group keeps
one bfloat16 scale ``s`` and per number a code ``c`` in ``0 .. 2^b - 1``; the number read back is
``s (c - (2^b - 1) / 2)``: uniform levels, symmetric around zero. The scale is the group's largest magnitude times
``clip``, so that the few largest numbers are clipped where that leaves less error in all. The clippings below were
searched on Gaussian vectors and on the singular vectors of fine-tuned adapters, which agree; choosing one per group
would lower the error by 4 % at several times the work. ``noise`` is the mean squared error they leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hydraopt.finite import all_finite

GROUP = 128
"""Numbers that share a scale."""

_CACHED = 1 << 20
"""Numbers that are encoded at once: four megabytes in float32 stay in a processor's last cache from step to step, and
calls for less cost more than that saves."""

_ON_CARD = 1 << 26
"""The same on a GPU, which has no such cache but takes its time to start anything."""

Block = npt.NDArray[np.uint8]
"""Stored bytes of some vectors of one precision: (count, bytes per vector)."""

_FIELDS = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}
"""A code is packed in fields of 8, 4, 2 or 1 bits, none of which crosses a byte."""


@dataclass(frozen=True)
class Precision:
    """Bits per number, and the relative squared error rounding to them leaves in a vector."""

    bits: int
    noise: float
    clip: float = 1.0

    @property
    def half(self) -> float:
        """Largest level in units of the scale."""
        return float(2**self.bits - 1) / 2


# Measured on Gaussian vectors; a test holds them to 5 %. For 16 bits: bfloat16.
PRECISIONS = {
    32: Precision(32, 6.4e-16),
    16: Precision(16, 2.7e-6),
    8: Precision(8, 4.2e-5),
    6: Precision(6, 6.8e-4),
    4: Precision(4, 1.05e-2, clip=0.9),
    3: Precision(3, 3.74e-2, clip=0.75),
    2: Precision(2, 1.23e-1, clip=0.55),
}
LOW_BITS = tuple(bits for bits in PRECISIONS if bits < 16)

_CORE_BITS = {32: 32, 16: 16, 8: 8, 6: 8, 4: 6, 3: 6, 2: 4}


def core_bits(bits: int) -> int:
    """Bits of the small factor beside a long one: being short, it is cheap to keep finer."""
    return _CORE_BITS[bits]


@lru_cache(maxsize=4096)
def vector_bytes(length: int, bits: int) -> int:
    """Bytes of one stored vector of ``length`` numbers, its scales included."""
    if bits >= 16:
        return length * bits // 8
    return sum(-(-length * field // 8) for field in _FIELDS[bits]) + 2 * _groups(length)


def encode(vectors: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The stored bytes of some vectors, and what they read back as.

    Args:
        vectors: (count, length), floating point.
        bits: One of :data:`PRECISIONS`.
        dtype: Float dtype for 16 and 32 bits.

    Returns:
        (count, ``vector_bytes(length, bits)``) in uint8, on the CPU; and (count, length) in the dtype and on the device
        of ``vectors``.
    """
    pieces = [
        _encode_few(piece, [(bits, len(piece))], dtype) for piece in torch.split(vectors, _at_once(vectors))
    ]
    data = _to_cpu(torch.cat([data for (data,), _ in pieces]))
    return data, torch.cat([decoded for _, decoded in pieces])


def _at_once(vectors: Tensor) -> int:
    """Vectors to encode together: so few that a processor's cache holds them, so many that calls cost little."""
    most = _CACHED if vectors.device.type == "cpu" else _ON_CARD
    return max(1, most // max(vectors.shape[-1], 1))


Runs = list[tuple[int, int]]
"""Precision of vectors that follow one another, and how many."""


def _encode_few(vectors: Tensor, runs: Runs, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """:func:`encode`, all vectors at once: the bytes of each run, where ``vectors`` are; and what they read back as.

    Several runs, none of them of 16 bits or more, take as many calls as one.
    """
    count, length = vectors.shape
    if runs[0][0] >= 16:
        stored = vectors.to(dtype).contiguous()
        # Flat: a single column counts as contiguous whatever lies between its numbers.
        flat = stored.flatten().view(torch.uint8).view(count, length * runs[0][0] // 8)
        return [flat], stored.to(vectors.dtype)
    half, share, zero, top = _levels(runs, vectors.device)
    width = min(length, GROUP)
    padded = vectors.float()
    if length % width:
        padded = torch.nn.functional.pad(padded, (0, -length % width))
    grouped = padded.view(count, _groups(length), width)
    largest = torch.maximum(grouped.amax(-1, keepdim=True), -grouped.amin(-1, keepdim=True))
    scales = (
        largest * share + 0.0
    ).bfloat16()  # of a group of zeros 0, where the maximum of 0 and -0 may be -0
    wide = scales.float()
    levels = grouped * torch.where(wide > 0, wide.reciprocal(), 0.0)
    levels.add_(half + 0.5).clamp_(zero, top)
    # Processors turn floats into signed integers, not into unsigned ones; eight bits need a wider one.
    eight = any(bits == 8 for bits, _ in runs)
    codes = levels.to(torch.int16).to(torch.uint8) if eight else levels.to(torch.int8).view(torch.uint8)
    decoded = levels.copy_(codes).sub_(half).mul_(wide).flatten(1)[:, :length]
    codes, as_bytes = codes.flatten(1)[:, :length], scales.flatten(1).view(torch.uint8)
    data, start = [], 0
    for bits, rows in runs:
        own = slice(start, start + rows)
        parts = [_pack(codes[own], shift, field, bits) for shift, field in _shifts(bits)]
        data.append(torch.cat([*parts, as_bytes[own]], dim=1))
        start += rows
    return data, decoded.to(vectors.dtype)


def _levels(runs: Runs, device: torch.device) -> tuple[Any, Any, Any, Any]:
    """Largest level, its inverse times the clipping, zero, and what is below the next level.

    Each a number or, where vectors differ, (count, 1, 1).
    """
    found = [
        (of.half, of.clip / of.half, 0.0, 2**of.bits - 0.5) for of in (PRECISIONS[bits] for bits, _ in runs)
    ]
    if len(found) == 1:
        return found[0]
    rows = np.repeat(np.array(found, dtype=np.float32).T, [rows for _, rows in runs], axis=1)
    half, share, zero, top = torch.from_numpy(rows).to(device)[:, :, None, None]
    return half, share, zero, top


def _to_cpu(data: Tensor) -> Tensor:
    """From a GPU into pages that are mapped already: forty times as fast as into fresh ones."""
    if data.device.type == "cpu":
        return data
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data)


def _all_to_cpu(tensors: list[Tensor]) -> list[Block]:
    """As :func:`_to_cpu`, all at once: a GPU is waited for each time."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    whole = _to_cpu(torch.cat([tensor.flatten() for tensor in tensors])).numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    parts = np.split(whole, ends[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def decode(data: Tensor, length: int, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers of :func:`encode`'s bytes.

    Args:
        data: (count, ``vector_bytes(length, bits)``), uint8.
        length: Numbers per vector.
        bits: One of :data:`PRECISIONS`.
        dtype: Float dtype for 16 and 32 bits.

    Returns:
        (count, length): in ``dtype`` for 16 and 32 bits, else in float32, which holds every level exactly.
    """
    count = data.shape[0]
    if bits >= 16:
        return _floats(data, dtype).view(count, length)
    groups = _groups(length)
    codes = torch.zeros(count, length, dtype=torch.uint8, device=data.device)
    start = 0
    for shift, field in _shifts(bits):
        width = -(-length * field // 8)
        codes |= _unpack(data[:, start : start + width], length, field) << shift
        start += width
    scales = _floats(data[:, start:], torch.bfloat16).float().view(count, groups, 1)
    width = min(length, GROUP)
    levels = codes.float().sub_(PRECISIONS[bits].half)
    if length % width:
        levels = torch.nn.functional.pad(levels, (0, -length % width))
    return levels.view(count, groups, width).mul_(scales).flatten(1)[:, :length]


def reads_finite(data: Tensor, length: int, bits: int, dtype: torch.dtype) -> bool:
    """Whether :func:`decode` would give finite numbers only. Of low-bit vectors none but the scales are looked at.

    Args:
        data: (count, ``vector_bytes(length, bits)``), uint8.
        length: Numbers per vector.
        bits: One of :data:`PRECISIONS`.
        dtype: Float dtype for 16 and 32 bits.
    """
    if bits >= 16:
        return all_finite(_floats(data, dtype))
    scales = _floats(data[:, vector_bytes(length, bits) - 2 * _groups(length) :], torch.bfloat16)
    return all_finite(scales.float() * PRECISIONS[bits].half)


def _floats(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as the flat floats they are, wherever they start."""
    return data.flatten().clone().view(dtype)


def encode_ragged(
    vectors: Tensor, levels: npt.NDArray[np.int64], bits: Sequence[int], dtype: torch.dtype
) -> tuple[list[list[Block]], Tensor]:
    """Encode the vectors of many heads, each at a precision of its own.

    Args:
        vectors: (K, P, length); overwritten.
        levels: (K, P): index into ``bits``, ascending along P; -1 for a vector that is not stored.
        bits: Precisions, finest first.
        dtype: Float dtype for 16 and 32 bits.

    Returns:
        Per head the blocks of bytes (finest first), each (count, bytes per vector); and what they decode to,
        (K, P, length) in the dtype and on the device of ``vectors``, zero where nothing is stored.
    """
    heads, _, length = vectors.shape
    flat = vectors.reshape(-1, length)
    masks = [levels == index for index in range(len(bits))]
    places = [np.flatnonzero(mask) for mask in masks]
    whole = torch.from_numpy(np.concatenate([*places, np.flatnonzero(levels < 0)])).to(flat.device)
    data: list[list[Tensor]] = [[] for _ in bits]
    start = 0
    for indices, runs in _together(bits, [len(own) for own in places], flat):
        piece = whole[start : start + sum(rows for _, rows in runs)]
        encoded, read_back = _encode_few(flat.index_select(0, piece), runs, dtype)
        flat.index_copy_(0, piece, read_back)
        for index, part in zip(indices, encoded, strict=True):
            data[index].append(part)
        start += len(piece)
    if start < len(whole):
        flat.index_fill_(0, whole[start:], 0.0)
    stored: list[list[Block]] = [[] for _ in range(heads)]
    found = _all_to_cpu([parts[0] if len(parts) == 1 else torch.cat(parts) for parts in data if parts])
    for rows, mask in zip(found, (mask for mask in masks if mask.any()), strict=True):
        start = 0
        for blocks, count in zip(stored, mask.sum(axis=1).tolist(), strict=True):
            if count:
                blocks.append(rows[start : start + count])
                start += count
    return stored, flat.view(vectors.shape)


def _together(
    bits: Sequence[int], counts: Sequence[int], vectors: Tensor
) -> Iterator[tuple[list[int], Runs]]:
    """What is encoded at once, with its places in ``bits``: everything below 16 bits, or a part of a run."""
    most = _at_once(vectors)
    left = [index for index, count in enumerate(counts) if count]
    low = [index for index in left if bits[index] < 16]
    fits = sum(counts[index] for index in low) <= most
    for index in left[: len(left) - len(low)] if fits else left:
        for start in range(0, counts[index], most):
            yield [index], [(bits[index], min(most, counts[index] - start))]
    if low and fits:
        yield low, [(bits[index], counts[index]) for index in low]


def _groups(length: int) -> int:
    return -(-length // GROUP)


def _shifts(bits: int) -> list[tuple[int, int]]:
    """(shift, field) of each field of a code, highest first."""
    fields, left = [], bits
    for field in _FIELDS[bits]:
        left -= field
        fields.append((left, field))
    return fields


_WIDE = {4: torch.int16, 2: torch.int32, 1: torch.int64}
"""Integers that hold as many codes, a byte each, as are packed into one byte."""


def _pack(codes: Tensor, shift: int, field: int, bits: int) -> Tensor:
    """``field`` bits of every code, (count, length) to (count, ceil(length field / 8)); the first in the low bits."""
    part = codes >> shift if shift else codes
    if shift + field < bits:
        part = part & (2**field - 1)
    if field == 8:
        return part
    per_byte = 8 // field
    if part.shape[1] % per_byte or part.shape[1] == 0:
        part = torch.nn.functional.pad(part, (0, -part.shape[1] % per_byte))
    wide = part.contiguous().view(_WIDE[field])
    packed = wide >> (8 - field)  # the code in byte 1 of each integer moves down to bit `field`
    packed |= wide
    for place in range(2, per_byte):
        packed |= wide >> ((8 - field) * place)
    return packed.to(torch.uint8)


def _unpack(packed: Tensor, length: int, field: int) -> Tensor:
    """The inverse of :func:`_pack`, without its shift."""
    if field == 8:
        return packed
    wide = packed.to(_WIDE[field])
    spread = wide.clone()
    for place in range(1, 8 // field):
        spread |= wide << ((8 - field) * place)
    mask = int.from_bytes(bytes([2**field - 1] * (8 // field)), "little")
    return (spread & mask).view(torch.uint8)[:, :length]
