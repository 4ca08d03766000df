"""Rice coding of sparse masks: within 5 % of their entropy at any density up to a half.

The gap between two marked places (the number of others before the next one) is split into `gap >> k`, written
in unary, and the low k bits, written as they are. Gaps of a random mask are geometric, for which Rice codes
with the right k are near optimal (Golomb, 1966). With k = 0 the unary stream is the bit mask itself, so
a dense mask costs what a bit mask costs. The two streams are kept apart: both then decode without a loop. Several
masks follow each other in the same two streams.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hf_approx.packing.spec import PackedFormatError

Bytes = NDArray[np.uint8]
Positions = NDArray[np.int64]


def best_parameter(gaps: Positions) -> int:
    """The smallest k that makes the code shortest; its length is convex in k."""
    # One more low bit a gap is worth it while it saves more than one unary bit a gap on average.
    k = 0
    while len(gaps) < int((gaps - (gaps >> 1)).sum()):
        gaps, k = gaps >> 1, k + 1
    return k


def encode(masks: Sequence[Positions]) -> tuple[tuple[int, ...], Bytes, Bytes]:
    """Code masks, each given as the sorted positions it marks; returns (a k for each, low bits, unary bits)."""
    parameters, low, unary = [], [np.empty(0, np.uint8)], [np.empty(0, np.uint8)]
    for positions in masks:
        gaps = np.diff(positions, prepend=-1) - 1
        k = best_parameter(gaps)
        ones = np.cumsum((gaps >> k) + 1) - 1
        bits = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
        bits[ones] = 1
        parameters.append(k)
        low.append(((gaps[:, None] >> np.arange(k)) & 1).astype(np.uint8).reshape(-1))
        unary.append(bits)
    packed = [np.packbits(np.concatenate(stream), bitorder="little") for stream in (low, unary)]
    return tuple(parameters), packed[0], packed[1]


def decode(
    parameters: Sequence[int], low: Bytes, unary: Bytes, counts: Sequence[int], sizes: Sequence[int]
) -> list[Positions]:
    """The positions that each mask marks.

    Args:
        parameters: k of every mask.
        low: Bytes of the low bits.
        unary: Bytes of the unary codes.
        counts: Number of places that every mask marks.
        sizes: Number of places that every mask has.

    Raises:
        PackedFormatError: The streams do not code exactly these masks.
    """
    ones = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(ones) != sum(counts):
        raise PackedFormatError(f"the masks mark {len(ones)} places, their entry says {sum(counts)}")
    bits = np.unpackbits(low, bitorder="little")
    masks = []
    end = 0
    for k, count, size in zip(parameters, counts, sizes, strict=True):
        own, ones = ones[:count], ones[count:]
        remainders, bits = bits[: count * k].reshape(count, k), bits[count * k :]
        quotients = np.diff(own, prepend=end - 1) - 1
        gaps = (quotients << k) + remainders.astype(np.int64) @ (1 << np.arange(k, dtype=np.int64))
        positions = np.cumsum(gaps + 1) - 1
        if count and (int(quotients.sum()) > size >> k or positions[-1] >= size):
            raise PackedFormatError(f"a mask reaches beyond its {size} places")
        masks.append(positions)
        end = int(own[-1]) + 1 if count else end
    return masks
