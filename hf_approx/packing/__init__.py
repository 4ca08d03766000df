"""The bytes of a compressed tensor: what is in them, how to write and read them exactly."""

from hf_approx.packing.sparse import pack, unpack, unpack_parts
from hf_approx.packing.spec import DTYPES, PackedFormatError, TensorSpec, dtype_from_name, dtype_name

__all__ = [
    "DTYPES",
    "PackedFormatError",
    "TensorSpec",
    "dtype_from_name",
    "dtype_name",
    "pack",
    "unpack",
    "unpack_parts",
]
