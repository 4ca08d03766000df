"""A weight mixed from a bank of templates as one row of bytes: its coefficients, in the bank's order.

The templates are stored once for all layers, as ordinary tensors under names of their own.
"""

import re
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_approx.packing.spec import DTYPES, PackedFormatError, TensorSpec, check_whole, dtype_name, shown

MAX_TEMPLATES = 1 << 16
"""More templates than this in one bank are taken for damage."""
MAX_BANK_NAME = 200
"""So are longer names of banks."""

_TAKEN = frozenset(dir(nn.ModuleDict()))


@dataclass(frozen=True, kw_only=True)
class SharedSpec(TensorSpec):
    """How a weight that is a linear combination of templates is stored.

    Attributes:
        bank: Name of the bank the templates are in.
        templates: How many there are, and coefficients.
    """

    kind: ClassVar[str] = "shared"

    bank: str
    templates: int

    @property
    def sparsity(self) -> float:
        """Share of weights that are zero: none is known to be."""
        return 0.0

    @property
    def bound_bytes(self) -> float:
        """The coefficients as they are."""
        return float(self.nbytes)

    def to_dict(self) -> dict[str, Any]:
        """As stored in `config.json`."""
        return {"kind": self.kind, **super().to_dict()}

    def check(self) -> None:
        """Raise `PackedFormatError` unless the row can be the coefficients of a bank."""
        if not is_bank_name(self.bank):
            raise PackedFormatError(f"bank {shown(self.bank)} is not the name of a bank.")
        check_whole("templates", self.templates, MAX_TEMPLATES)
        if self.templates == 0 or self.nbytes != self.templates * DTYPES[self.dtype].itemsize:
            raise PackedFormatError(f"{self.nbytes} bytes cannot hold {self.templates} coefficients.")


def is_bank_name(name: object) -> bool:
    """Whether a bank can have this name: letters, digits, '_' and '-', but no attribute of modules, such as `type`."""
    return (
        isinstance(name, str)
        and len(name) <= MAX_BANK_NAME
        and re.fullmatch(r"[\w-]+", name) is not None
        and name not in _TAKEN
    )


def pack_shared(
    coefficients: Tensor, shape: tuple[int, ...], bank: str, dtype: torch.dtype | None = None
) -> tuple[Tensor, SharedSpec]:
    """Pack the coefficients of one layer, rounding them to `dtype` (default: their own).

    Args:
        coefficients: Shape (templates,), any device.
        shape: Shape of the weight they make.
        bank: Name of the bank.
        dtype: float32, float16 or bfloat16.

    Returns:
        The packed bytes (uint8, one dimension, on the CPU) and what is needed to read them.

    Raises:
        ValueError: The dtype cannot be stored, or a finite coefficient overflows it.
    """
    name = dtype_name(dtype or coefficients.dtype)
    dense = coefficients.detach().to("cpu")
    stored = dense.to(DTYPES[name])
    if bool((stored.isinf() & dense.isfinite()).any()):
        raise ValueError(f"A coefficient of size {float(dense.abs().max()):.3g} does not fit {name}; store bfloat16.")
    # A contiguous tensor of one element can have any stride; a view as bytes needs 1.
    packed = stored.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    spec = SharedSpec(
        shape=tuple(shape),
        dtype=name,
        bank=bank,
        templates=len(dense),
        nbytes=packed.numel(),
        crc32=zlib.crc32(packed.numpy().tobytes()),
    )
    return packed, spec


def unpack_shared(packed: Tensor, spec: SharedSpec, dtype: torch.dtype | None = None) -> Tensor:
    """The coefficients on the packed tensor's device, in `dtype` (default: as stored), of shape (templates,).

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """
    values = torch.from_numpy(spec.read(packed).copy()).view(DTYPES[spec.dtype])
    return values.to(device=packed.device, dtype=dtype)
