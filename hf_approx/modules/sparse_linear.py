"""A linear layer that multiplies by the CSR form of its packed weight."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from hf_approx.packing import SparseSpec, unpack_parts

MAX_DENSITY = 0.15
"""Above this density torch's dense product on a CPU is faster than its CSR product for some batch sizes."""


def to_csr(positions: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The (rows, columns) matrix with `values` at the flattened `positions`, in sparse CSR layout."""
    # MKL computes with 32-bit indices and would convert wider ones at every product.
    index = torch.int32 if values.numel() < 2**31 else torch.int64
    starts = torch.zeros(shape[0] + 1, dtype=index)
    starts[1:] = torch.bincount(positions // shape[1], minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, (positions % shape[1]).to(index), values, shape, check_invariants=True)


class SparseLinear(nn.Module):
    """Inference-only `y = x W^T + b` with a sparse W.

    `weight` is the CSR matrix of shape (out, in), whatever layout the original layer stored. The state dict
    holds the packed bytes in its place, so saving writes what was read.

    Args:
        packed: The packed weight, one row of bytes.
        spec: How to read it; its shape is (out, in), or (in, out) if `transposed`.
        bias: Shape (out,), or None.
        dtype: Dtype of the product, float32 or float64.
        transposed: The layer is a GPT-2 `Conv1D`, which stores W^T.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """

    weight: Tensor
    packed: Tensor

    def __init__(
        self,
        packed: Tensor,
        spec: SparseSpec,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        transposed: bool,
    ) -> None:
        super().__init__()
        positions, values = unpack_parts(packed, spec)
        rows, columns = spec.shape
        if transposed:
            positions, order = ((positions % columns) * rows + positions // columns).sort()
            values, (rows, columns) = values[order], (columns, rows)
        self.out_features, self.in_features = rows, columns
        self.bias = bias
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("weight", to_csr(positions, values.to(dtype), (rows, columns)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the weight's dtype under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            y = torch.sparse.mm(self.weight, x.reshape(-1, self.in_features).to(self.weight.dtype).T).T
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        density = self.weight.values().numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.3f}"
