"""The kinds of packing an entry of a config can have."""

from typing import Any

from hf_approx.packing.quantized import QuantizedSpec
from hf_approx.packing.shared import SharedSpec
from hf_approx.packing.sparse import SparseSpec
from hf_approx.packing.spec import PackedFormatError, TensorSpec, check_name, shown

KINDS: dict[str, type[TensorSpec]] = {spec.kind: spec for spec in (SparseSpec, QuantizedSpec, SharedSpec)}


def spec_from_dict(name: str, data: Any) -> TensorSpec:
    """Read and check one entry of a config; without a kind it is sparse, as all were in format version 1.

    Raises:
        PackedFormatError: The kind is unknown, or the entry is not one of this kind.
    """
    check_name(name)
    fields = dict(data) if isinstance(data, dict) else {}
    kind = fields.pop("kind", SparseSpec.kind)
    if not isinstance(kind, str) or kind not in KINDS:
        raise PackedFormatError(f"Packed weight '{name}': kind {shown(kind)} is unknown.")
    return KINDS[kind].from_dict(name, fields)
