"""Stored numbers: what is written reads back, in as many bytes as promised, as close as the solver assumes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hydraopt.precision import (
    GROUP,
    LOW_BITS,
    PRECISIONS,
    core_bits,
    decode,
    encode,
    encode_ragged,
    reads_finite,
    vector_bytes,
)


def dtype_of(bits):
    return torch.bfloat16 if bits == 16 else torch.float32


def gaussian(count, length, seed=0, dtype=torch.float32):
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(sorted(PRECISIONS)), count=st.integers(0, 5), length=st.integers(1, 300))
def test_what_is_written_reads_back(bits, count, length):
    data, read_back = encode(gaussian(count, length, seed=length), bits, dtype_of(bits))
    assert data.shape == (count, vector_bytes(length, bits))
    assert torch.equal(decode(data, length, bits, dtype_of(bits)).float(), read_back)


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
def test_every_level_can_be_written(bits):
    """A ramp through all codes of a group comes back in order and spans the clipped range evenly."""
    ramp = torch.linspace(-1, 1, GROUP)[None]
    _, read_back = encode(ramp, bits, torch.bfloat16)
    levels = torch.unique(read_back)
    assert len(levels) == min(2**bits, GROUP)
    assert bool((read_back.diff() >= 0).all())
    if 2**bits <= GROUP:
        torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(2**bits - 1), rtol=1e-4, atol=0)


def written(vectors, bits):
    """The bytes the format describes, in numpy: codes from the low bit up, field by field, then the scales."""
    fields = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}[bits]
    clip = {4: 0.9, 3: 0.75, 2: 0.55}.get(bits, 1.0)
    half = np.float32((2**bits - 1) / 2)
    stored = []
    for vector in vectors:
        codes, scales = [], []
        for start in range(0, len(vector), GROUP):
            group = vector[start : start + GROUP]
            scale = (np.abs(group).max() * np.float32(clip / half)).view(np.uint32)
            scale = (int(scale) + 0x7FFF + (int(scale) >> 16 & 1)) >> 16  # the nearest bfloat16
            scales.append(scale)
            wide = np.uint32(scale << 16).view(np.float32)
            levels = group * (1 / wide) if wide > 0 else np.zeros_like(group)
            codes.append(np.clip(np.floor(levels + half + np.float32(0.5)), 0, 2**bits - 1).astype(np.uint8))
        low, parts = np.unpackbits(np.concatenate(codes)[:, None], axis=1, bitorder="little"), []
        for place, field in enumerate(fields):
            shift = sum(fields[place + 1 :])
            parts.append(np.packbits(low[:, shift : shift + field], bitorder="little"))
        stored.append(np.concatenate([*parts, np.array(scales, dtype="<u2").view(np.uint8)]))
    return np.stack(stored)


@pytest.mark.parametrize("bits", LOW_BITS)
def test_the_bytes_are_those_the_format_describes(bits):
    """Every code, the high ones of 8 bits too, and of zeros the middle one."""
    vectors = gaussian(9, 300, seed=bits)
    vectors[4], vectors[5, 128:256] = 0, 0
    data = encode(vectors, bits, torch.bfloat16)[0].numpy()
    assert np.array_equal(data, written(vectors.numpy(), bits))


@pytest.mark.parametrize("bits", sorted(PRECISIONS))
def test_the_noise_the_solver_assumes_is_the_noise_there_is(bits):
    """5 %: what a million Gaussian numbers scatter by, several times over."""
    vectors = gaussian(500, 2048, dtype=torch.float64)
    _, read_back = encode(vectors, bits, dtype_of(bits))
    noise = float((read_back - vectors).square().sum() / vectors.square().sum())
    assert noise == pytest.approx(PRECISIONS[bits].noise, rel=0.05)


def test_fewer_bits_cost_fewer_bytes_and_more_noise():
    order = sorted(PRECISIONS)
    assert [vector_bytes(4096, bits) for bits in order] == sorted(vector_bytes(4096, bits) for bits in order)
    assert [PRECISIONS[bits].noise for bits in order] == sorted(
        (PRECISIONS[bits].noise for bits in order), reverse=True
    )
    assert all(core_bits(bits) >= bits for bits in order)
    # 16 bits of scale for each 128 numbers, nothing else
    assert all(vector_bytes(4096, bits) == 4096 * bits // 8 + 2 * 4096 // GROUP for bits in LOW_BITS)


@pytest.mark.parametrize(
    ("bits", "core", "size"),
    [(32, 32, 1200), (16, 16, 600), (8, 8, 306), (6, 8, 231), (4, 6, 156), (3, 6, 119), (2, 4, 81)],
)
def test_bytes_of_a_vector_and_bits_of_its_core(bits, core, size):
    """300 numbers: fields rounded up to bytes one by one, and three scales."""
    assert (core_bits(bits), vector_bytes(300, bits)) == (core, size)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_size_of_the_numbers_does_not_matter(bits, scale):
    """The scale is rounded to bfloat16 and so clips a little more or less: a tenth of the noise at most."""
    vectors = gaussian(40, 256)
    _, read_back = encode(vectors * scale, bits, torch.bfloat16)
    noise = float((read_back / scale - vectors).square().sum() / vectors.square().sum())
    assert noise <= 1.1 * PRECISIONS[bits].noise


def test_zeros_stay_zero():
    for bits in LOW_BITS:
        _, read_back = encode(torch.zeros(2, 200), bits, torch.bfloat16)
        assert torch.equal(read_back, torch.zeros(2, 200))


@pytest.mark.parametrize("bits", PRECISIONS)
def test_how_many_are_encoded_at_once_is_irrelevant(bits, monkeypatch):
    vectors, dtype = gaussian(40, 300), torch.float32 if bits == 32 else torch.bfloat16
    together = encode(vectors, bits, dtype)
    monkeypatch.setattr("hydraopt.precision._CACHED", 900)
    for one, other in zip(encode(vectors, bits, dtype), together, strict=True):
        assert torch.equal(one, other)


def test_vectors_of_many_heads_keep_their_own_precision():
    vectors = gaussian(15, 40).view(3, 5, 40)
    levels = np.array([[0, 0, 1, 2, -1], [-1, -1, -1, -1, -1], [1, 1, 1, 1, 1]])
    bits = (16, 8, 3)
    stored, read_back = encode_ragged(vectors.clone(), levels, bits, torch.bfloat16)
    for head in range(3):
        for place, level in enumerate(levels[head]):
            expected = torch.zeros(1, 40)
            if level >= 0:
                _, expected = encode(vectors[head, place][None], bits[level], torch.bfloat16)
            assert torch.equal(read_back[head, place][None], expected)
        assert [block.shape[0] for block in stored[head]] == [
            count for level in range(3) if (count := int((levels[head] == level).sum()))
        ]


def test_vectors_of_several_precisions_at_once_are_as_one_by_one():
    runs = [(8, 3), (6, 1), (4, 4), (3, 2), (2, 5)]
    vectors = gaussian(15, 300)
    levels = np.repeat(np.arange(len(runs)), [rows for _, rows in runs])[None]
    (data,), (decoded,) = encode_ragged(
        vectors[None].clone(), levels, [bits for bits, _ in runs], torch.bfloat16
    )
    start = 0
    for (bits, rows), found in zip(runs, data, strict=True):
        expected = encode(vectors[start : start + rows], bits, torch.bfloat16)
        assert np.array_equal(found, expected[0].numpy())
        assert torch.equal(decoded[start : start + rows], expected[1])
        start += rows


@pytest.mark.parametrize("bits", PRECISIONS)
@pytest.mark.parametrize("spoil", [None, math.nan, math.inf, -math.inf, 3e38])
def test_what_reads_back_as_no_number_is_told_without_reading(bits, spoil):
    """Any one scale, or number of 16 or 32 bits, against what decoding gives: 3e38 times a high level is too much."""
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    data, _ = encode(gaussian(5, 300, seed=bits), bits, dtype)
    if spoil is not None:
        kept = dtype if bits >= 16 else torch.bfloat16  # the scales are last in a vector
        wrong = torch.tensor([spoil]).to(kept).view(torch.uint8)
        data[3, data.shape[1] - len(wrong) :] = wrong
    finite = bool(torch.isfinite(decode(data, 300, bits, dtype)).all())
    assert finite == (spoil is None or (spoil == 3e38 and bits >= 16))
    assert reads_finite(data, 300, bits, dtype) == finite
    assert reads_finite(data[:0], 300, bits, dtype)
