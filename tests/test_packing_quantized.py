"""Quantized weights: exact, near the bound, and never fooled by damage."""

import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_approx.packing import (
    DTYPES,
    Grid,
    PackedFormatError,
    SparseSpec,
    pack,
    pack_quantized,
    round_to_grid,
    spec_from_dict,
    unpack,
    unpack_quantized,
)
from hf_approx.packing.grid import expand


def parts(shape, granularity):
    """Shape of a grid over a weight of two or more dimensions."""
    rest = [1] * (len(shape) - 2)
    return {
        "weight": list(shape),
        "group": [shape[0], -(-shape[1] // 4), *rest],
        "channel": [shape[0], 1, *rest],
        "tensor": [1, 1, *rest],
    }[granularity]


def make(shape, granularity, widths, scale_dtype=torch.float32, density=1.0, seed=0, dtype=torch.float32):
    """A random weight with a random share of zeros, and a grid with every one of the widths."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    weight = weight * (torch.rand(shape, generator=generator) < density)
    grid_shape = parts(shape, granularity)
    chosen = torch.randint(0, len(widths), grid_shape, generator=generator)
    scale_shape = parts(shape, "channel" if granularity == "weight" else granularity)
    scale = (0.02 + 0.1 * torch.rand(scale_shape, generator=generator)).to(scale_dtype)
    return weight.to(dtype), Grid(torch.tensor(widths, dtype=torch.uint8)[chosen], scale)


def assert_exact(weight, grid):
    packed, spec = pack_quantized(weight, grid)
    again = spec_from_dict("w", spec.to_dict())
    assert again == spec
    for dtype in (weight.dtype, torch.float16, torch.bfloat16, torch.float64):
        decoded, _ = unpack_quantized(packed, again, dtype)
        expected = round_to_grid(weight.to(torch.float32), grid)
        assert decoded.dtype == dtype
        assert torch.equal(decoded, expected.to(dtype))
        assert not torch.signbit(decoded[decoded == 0]).any()
    decoded, found = unpack_quantized(packed, spec)
    assert decoded.dtype == weight.dtype
    assert torch.equal(found.scale, grid.scale)
    assert found.scale.dtype == grid.scale.dtype
    kept = decoded != 0
    assert torch.equal(expand(found.bits, weight.shape)[kept], expand(grid.bits, weight.shape)[kept])
    repacked, respec = pack_quantized(decoded, found)
    assert torch.equal(repacked, packed)
    assert respec == spec
    return packed, spec, decoded


@pytest.mark.parametrize("granularity", ["weight", "group", "channel", "tensor"])
@pytest.mark.parametrize("widths", [[k] for k in range(1, 9)] + [[2, 4], [1, 2, 3, 4, 5, 6, 7, 8], [0, 3, 5]])
def test_every_width_and_granularity_round_trips(granularity, widths):
    for shape, density in (((13, 11), 1.0), ((5, 7, 3, 3), 0.6)):
        weight, grid = make(shape, granularity, widths, density=density)
        _, spec, decoded = assert_exact(weight, grid)
        assert spec.weights[0] == int((decoded == 0).sum())
        assert set(np.flatnonzero(spec.weights[1:]) + 1) <= set(widths)


@settings(max_examples=150)
@given(st.data())
def test_anything_round_trips(data):
    shape = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4).filter(lambda s: math.prod(s) < 3000))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    bits_shape, scale_shape = ([data.draw(st.integers(1, d)) for d in shape] for _ in range(2))
    widths = torch.tensor(data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=5)), dtype=torch.uint8)
    scale_dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    bits = widths[torch.randint(0, len(widths), bits_shape, generator=generator)]
    scale = (0.1 + torch.rand(scale_shape, generator=generator)).to(scale_dtype)
    assert_exact(weight.to(dtype), Grid(bits, scale))


@pytest.mark.parametrize("scale_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("k", range(1, 9))
def test_a_code_of_k_bits_takes_k_bits(k, scale_dtype):
    weight, grid = make((64, 48), "tensor", [k], scale_dtype)
    packed, spec, _ = assert_exact(weight, grid)
    assert packed.numel() == 64 * 48 * k // 8 + scale_dtype.itemsize
    assert spec.weights == tuple(64 * 48 if width == k else 0 for width in range(9))
    assert spec.rice == ()


def entropy(counts):
    p = np.array([c for c in counts if c]) / sum(counts)
    return -sum(counts) * float((p * np.log2(p)).sum())


@pytest.mark.parametrize("density", [1.0, 0.7, 0.3, 0.1])
@pytest.mark.parametrize(
    ("granularity", "widths"),
    [
        ("weight", [1, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5]),
        ("weight", [2] * 9 + [8]),
        ("weight", [1, 2]),
        ("weight", list(range(9))),
        ("weight", [0] * 3 + [1] * 2 + [2]),
        ("group", [2, 3, 3, 4]),
        ("channel", [1, 2, 3, 4, 8]),
        ("tensor", [1]),
    ],
)
def test_within_five_percent_of_the_bound(granularity, widths, density):
    """The bound counted here from the weight: assigned bits, entropy of the map and of the zeros, scales."""
    weight, grid = make((384, 512), granularity, widths, torch.float16, density)
    packed, spec = pack_quantized(weight, grid)
    decoded, found = unpack_quantized(packed, spec)
    bits = expand(found.bits, weight.shape)
    kept = decoded != 0
    bound = float(bits[kept].sum()) + 16 * grid.scale.numel()
    bound += entropy(found.bits.reshape(-1).bincount(minlength=9).tolist())
    zeros = int((~kept & (bits > 0)).sum())
    bound += entropy([zeros, int(kept.sum())]) if zeros else 0.0
    assert spec.bound_bytes == pytest.approx(bound / 8)
    assert 8 * packed.numel() <= 1.05 * bound
    assert spec.bits == pytest.approx(8 * packed.numel() / weight.numel())


def test_pruned_weights_cost_no_more_than_their_mask():
    """A per-weight map that gives pruned weights bits is stored as one that does not."""
    weight, grid = make((200, 300), "weight", [2, 4], density=0.1)
    without = Grid(torch.where(weight == 0, 0, grid.bits), grid.scale)
    assert torch.equal(pack_quantized(weight, grid)[0], pack_quantized(weight, without)[0])
    dense, all_bits = make((200, 300), "weight", [2, 4])
    assert pack_quantized(weight, grid)[0].numel() < 0.3 * pack_quantized(dense, all_bits)[0].numel()


def test_all_zero():
    for bits in (0, 4):
        grid = Grid(torch.full((3, 1), bits, dtype=torch.uint8), torch.ones(1, 1))
        packed, spec = pack_quantized(torch.zeros(3, 5), grid)
        assert packed.numel() == 4
        assert spec.sparsity == 1
        assert torch.equal(unpack_quantized(packed, spec)[0], torch.zeros(3, 5))


def test_a_strided_weight_is_packed_by_value():
    weight, grid = make((12, 20), "weight", [1, 3, 8])
    other = Grid(grid.bits.T, grid.scale.expand(12, 20).T)
    straight = Grid(other.bits.contiguous(), other.scale.contiguous())
    assert torch.equal(pack_quantized(weight.T, other)[0], pack_quantized(weight.T.contiguous(), straight)[0])


@settings(max_examples=150)
@given(st.data())
def test_no_flipped_or_lost_byte_goes_unnoticed(data):
    granularity = data.draw(st.sampled_from(["weight", "group", "channel", "tensor"]))
    packed, spec = pack_quantized(*make((9, 14), granularity, [1, 3, 4], density=0.8))
    position = data.draw(st.integers(0, packed.numel() - 1))
    flipped = packed.clone()
    flipped[position] ^= data.draw(st.integers(1, 255))
    for damaged in (flipped, packed[:position], torch.cat([packed, packed[:1]]), packed.float(), packed[None]):
        with pytest.raises(PackedFormatError):
            unpack_quantized(damaged, spec)


@settings(max_examples=300)
@given(st.data())
def test_damage_with_a_matching_checksum_is_refused_or_harmless(data):
    """An error of ours or a weight of the stated shape and counts, whichever bytes and numbers are changed."""
    packed, spec = pack_quantized(
        *make((6, 8), data.draw(st.sampled_from(["weight", "group"])), [0, 1, 3, 4], density=0.7)
    )
    blob = bytearray(packed.numpy().tobytes())
    for _ in range(data.draw(st.integers(0, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    entry = {**spec.to_dict(), "crc32": zlib.crc32(blob)}
    number = st.integers(-1, 60)
    for field in data.draw(st.sets(st.sampled_from(sorted(entry)), max_size=2)):
        if field in ("grid", "scale", "shape", "entries", "weights", "rice") and entry[field]:
            entry[field][data.draw(st.integers(0, len(entry[field]) - 1))] = data.draw(number)
            a, b = (data.draw(st.integers(0, len(entry[field]) - 1)) for _ in range(2))
            entry[field][a], entry[field][b] = entry[field][b], entry[field][a]
        elif field == "masked":
            entry[field] = data.draw(number)
    try:
        read = spec_from_dict("w", entry)
        weight, grid = unpack_quantized(torch.frombuffer(blob, dtype=torch.uint8), read)
    except PackedFormatError:
        return
    assert list(weight.shape) == entry["shape"]
    assert int((weight == 0).sum()) >= entry["weights"][0]
    assert grid.bits.reshape(-1).bincount(minlength=9).tolist() == entry["entries"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kind", "wavelet", "kind 'wavelet' is unknown"),
        ("kind", ["sparse"], "is unknown"),
        ("shape", [0, 3], "not a list of positive"),
        ("shape", [2**30, 2**30], "larger than any weight"),
        ("dtype", "int4", "dtype 'int4' is unknown"),
        ("grid", [12], "does not fit shape"),
        ("grid", [13, 1], "does not fit shape"),
        ("grid", [True, 1], "not a list of positive"),
        ("scale", [1, 0], "not a list of positive"),
        ("scale", "1", "not a list of positive"),
        ("scale_dtype", "float64", "'float64' is unknown"),
        ("scale_dtype", ["float16"], "is unknown"),
        ("entries", [0] * 9, "expected a sum of 240"),
        ("entries", [240], "expected 9 numbers"),
        ("entries", 240, "expected 9 numbers"),
        ("weights", [-1, 241, 0, 0, 0, 0, 0, 0, 0], "weights is -1"),
        ("weights", [0, 0.5, 0, 239.5, 0, 0, 0, 0, 0], "weights is 0.5"),
        ("weights", [True, 239, 0, 0, 0, 0, 0, 0, 0], "weights is True"),
        ("masked", 241, "masked is 241"),
        ("masked", None, "masked is None"),
        ("rice", [], "expected 2 numbers"),
        ("rice", [0, 64], "rice is 64"),
        ("nbytes", 10, "10 bytes cannot hold"),
        ("nbytes", 4.0, "nbytes is 4.0"),
        ("nbytes", 3000, "3000 bytes cannot hold"),
        ("crc32", 2**32, "crc32 is"),
    ],
)
def test_impossible_entries_are_refused(field, value, message):
    good = pack_quantized(*make((12, 20), "weight", [1, 3, 8]))[1].to_dict()
    with pytest.raises(PackedFormatError, match=f"'layer': .*{message}"):
        spec_from_dict("layer", {**good, field: value})


def test_missing_and_unknown_fields_are_refused():
    good = pack_quantized(*make((12, 20), "weight", [1, 3, 8]))[1].to_dict()
    missing = {field: value for field, value in good.items() if field != "rice"}
    sparse = {field: value for field, value in good.items() if field != "kind"}
    for bad in ({**good, "more": 1}, missing, sparse, None, []):
        with pytest.raises(PackedFormatError, match="must have the fields"):
            spec_from_dict("layer", bad)


def test_an_entry_without_a_kind_is_sparse():
    """Bytes and entry as the first release, which knew no kinds, wrote them."""
    entry = {"shape": [4, 5], "dtype": "float16", "nnz": 3, "rice": 2, "nbytes": 8, "crc32": 3450386577}
    read = spec_from_dict("layer", entry)
    assert isinstance(read, SparseSpec)
    assert read.to_dict() == entry
    weight = torch.zeros(4, 5)
    weight[0, 1], weight[1, 4], weight[3, 3] = 1.5, -2, 0.25
    packed = torch.tensor(list(bytes.fromhex("0d25003e00c00034")), dtype=torch.uint8)
    assert torch.equal(unpack(packed, read), weight.half())
    assert torch.equal(pack(weight.half())[0], packed)


def test_a_file_of_scales_that_are_not_positive_is_refused():
    packed, spec = pack_quantized(*make((4, 4), "tensor", [3]))
    for value in (0.0, -1.0, math.nan, math.inf):
        packed[:4] = torch.tensor([value]).view(torch.uint8)
        entry = {**spec.to_dict(), "crc32": zlib.crc32(packed.numpy())}
        with pytest.raises(PackedFormatError, match="not a positive number"):
            unpack_quantized(packed, spec_from_dict("w", entry))


@pytest.mark.parametrize(
    ("weight", "grid", "message"),
    [
        (torch.ones(2, 3), Grid(torch.ones(2, 3), torch.ones(1, 1)), "are uint8, 0 to 8"),
        (torch.ones(2, 3), Grid(torch.full((1, 1), 9, dtype=torch.uint8), torch.ones(1, 1)), "are uint8, 0 to 8"),
        (torch.ones(2, 3), Grid(torch.ones(1, 4, dtype=torch.uint8), torch.ones(1, 1)), r"\[1, 4\] does not fit"),
        (torch.ones(2, 3), Grid(torch.ones(1, 1, dtype=torch.uint8), torch.ones(2)), r"\[2\] does not fit"),
        (torch.ones(2, 3), Grid(torch.ones(1, 1, dtype=torch.uint8), torch.zeros(1, 1)), "not a positive number"),
        (torch.ones(2, 3), Grid(torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1).double()), "not 'float64'"),
        (torch.full((2, 3), math.nan), Grid(torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1)), "not a finite"),
        (torch.ones(2, 3).double(), Grid(torch.ones(1, 1, dtype=torch.uint8), torch.ones(1, 1)), "not 'float64'"),
    ],
)
def test_what_cannot_be_packed_is_refused(weight, grid, message):
    with pytest.raises(ValueError, match=message):
        pack_quantized(weight, grid)
