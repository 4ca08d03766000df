"""The packed format: exact, near entropy, and never fooled by damage."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_approx.packing import DTYPES, PackedFormatError, SparseSpec, may_gain, pack, rice, unpack


@st.composite
def sparse_tensors(draw):
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: math.prod(s) < 20_000))
    density = draw(st.sampled_from([0.0, 0.003, 0.1, 0.5, 0.9, 1.0]))
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator)
    kept = torch.rand(shape, generator=generator) < density
    return torch.where(kept, weight, torch.zeros(())).to(dtype)


@settings(max_examples=150)
@given(sparse_tensors())
def test_round_trip_is_bit_exact_and_canonical(weight):
    packed, spec = pack(weight)
    again = unpack(packed, SparseSpec.from_dict("w", spec.to_dict()))
    assert again.dtype == weight.dtype
    assert torch.equal(again, weight)
    repacked, respec = pack(again)
    assert torch.equal(repacked, packed)
    assert respec == spec


@settings(max_examples=100)
@given(st.sets(st.integers(0, 3000), max_size=400), st.integers(0, 500))
def test_any_set_of_positions_survives(positions, extra):
    ordered = np.array(sorted(positions), dtype=np.int64)
    numel = (int(ordered[-1]) if len(ordered) else 0) + 1 + extra
    parameters, low, unary = rice.encode([ordered, ordered[::2]])
    counts = [len(ordered), len(ordered[::2])]
    first, second = rice.decode(parameters, low, unary, counts, [numel, numel])
    assert np.array_equal(first, ordered)
    assert np.array_equal(second, ordered[::2])


@settings(max_examples=200)
@given(st.data())
def test_no_flipped_or_lost_byte_goes_unnoticed(data):
    packed, spec = pack(data.draw(sparse_tensors()).half())
    if packed.numel() == 0:
        return
    position = data.draw(st.integers(0, packed.numel() - 1))
    flipped = packed.clone()
    flipped[position] ^= data.draw(st.integers(1, 255))
    for damaged in (flipped, packed[:position], torch.cat([packed, packed[:1]])):
        with pytest.raises(PackedFormatError):
            unpack(damaged, spec)


@settings(max_examples=300)
@given(st.data())
def test_a_hostile_entry_is_refused_or_harmless(data):
    """Whatever the numbers say, with a matching checksum: an error of ours or a tensor of the stated shape."""
    blob = data.draw(st.binary(max_size=64))
    entry = {
        "shape": data.draw(st.lists(st.integers(-1, 70), max_size=3)),
        "dtype": data.draw(st.sampled_from(["float16", "float32", "float8"])),
        "nnz": data.draw(st.integers(-1, 80)),
        "rice": data.draw(st.integers(-1, 70)),
        "nbytes": len(blob),
        "crc32": zlib.crc32(blob),
    }
    try:
        spec = SparseSpec.from_dict("w", entry)
        dense = unpack(torch.frombuffer(bytearray(blob) or bytearray(1), dtype=torch.uint8)[: len(blob)], spec)
    except PackedFormatError:
        return
    assert list(dense.shape) == entry["shape"]
    assert int(dense.isnan().logical_or(dense != 0).sum()) <= entry["nnz"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shape", [0, 3]),
        ("shape", "4"),
        ("shape", [2**30, 2**30]),
        ("dtype", "int4"),
        ("dtype", ["float16"]),
        ("nnz", 13),
        ("nnz", True),
        ("rice", 5),
        ("nbytes", -1),
        ("nbytes", 4.0),
        ("crc32", 2**32),
    ],
)
def test_impossible_entries_are_refused(field, value):
    good = pack(torch.eye(3, 4))[1].to_dict()
    with pytest.raises(PackedFormatError, match="'layer'"):
        SparseSpec.from_dict("layer", {**good, field: value})


def test_missing_and_unknown_fields_are_refused():
    good = pack(torch.eye(3))[1].to_dict()
    for bad in ({**good, "more": 1}, {k: v for k, v in good.items() if k != "nnz"}, None, []):
        with pytest.raises(PackedFormatError, match="must have the fields"):
            SparseSpec.from_dict("layer", bad)


@pytest.mark.parametrize("density", [0.3, 0.1, 0.05, 0.02, 0.01])
def test_mask_is_within_three_percent_of_entropy(density):
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(1000, 1000, generator=generator) * (torch.rand(1000, 1000, generator=generator) < density)
    packed, spec = pack(weight.half())
    assert 8 * (packed.numel() - spec.value_bytes) <= 1.03 * spec.entropy_bits
    assert packed.numel() <= 1.02 * (spec.entropy_bits / 8 + spec.value_bytes)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_no_other_parameter_is_shorter(gaps):
    lengths = [len(gaps) * (k + 1) + sum(gap >> k for gap in gaps) for k in range(20)]
    assert rice.best_parameter(np.array(gaps)) == int(np.argmin(lengths))


def test_a_dense_mask_costs_a_bit_a_weight():
    packed, spec = pack(torch.ones(64, 64).half())
    assert spec.rice == 0
    assert packed.numel() == 64 * 64 * (2 + 1 / 8)


def test_overflow_is_refused():
    with pytest.raises(ValueError, match="does not fit float16"):
        pack(torch.tensor([1e6]), torch.float16)
    assert torch.isinf(unpack(*pack(torch.tensor([math.inf]), torch.float16))).all()


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="not 'float64'"):
        pack(torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_weight_that_would_be_smaller_is_taken_for_one_that_cannot_be(dtype):
    found = set()
    for zeros in range(0, 130, 3):
        for weight in (torch.ones(1000), torch.ones(1000)[torch.randperm(1000)]):
            weight[:zeros] = 0
            smaller = pack(weight, dtype)[1].nbytes < weight.numel() * dtype.itemsize
            assert may_gain(weight, dtype) or not smaller
            found.add((may_gain(weight, dtype), smaller))
    assert {(True, True), (False, False)} <= found
