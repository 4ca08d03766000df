"""The bytes of a compressed tensor: what is in them, how to write and read them exactly."""

from hf_approx.packing.grid import MAX_BITS, Grid, expand, round_to_grid
from hf_approx.packing.kinds import spec_from_dict
from hf_approx.packing.quantized import QuantizedSpec, check_grid, pack_quantized, unpack_quantized
from hf_approx.packing.shared import SharedSpec, is_bank_name, pack_shared, unpack_shared
from hf_approx.packing.sparse import SparseSpec, may_gain, pack, unpack, unpack_parts
from hf_approx.packing.spec import (
    DTYPES,
    PackedFormatError,
    TensorSpec,
    check_name,
    check_whole,
    dtype_from_name,
    dtype_name,
    is_name,
    shown,
)

__all__ = [
    "DTYPES",
    "MAX_BITS",
    "Grid",
    "PackedFormatError",
    "QuantizedSpec",
    "SharedSpec",
    "SparseSpec",
    "TensorSpec",
    "check_grid",
    "check_name",
    "check_whole",
    "dtype_from_name",
    "dtype_name",
    "expand",
    "is_bank_name",
    "is_name",
    "may_gain",
    "pack",
    "pack_quantized",
    "pack_shared",
    "round_to_grid",
    "shown",
    "spec_from_dict",
    "unpack",
    "unpack_parts",
    "unpack_quantized",
    "unpack_shared",
]
