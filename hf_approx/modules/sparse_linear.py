"""A linear layer that keeps its weight packed and multiplies by its CSR form."""

import warnings

import torch
from torch import Tensor, nn

from hf_approx.packing import TensorSpec, unpack_parts

MAX_DENSITY = 0.3
"""Above this density a dense product is faster than torch's CSR product on CPU."""


def to_csr(positions: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The (rows, columns) matrix with `values` at the flattened `positions`, in sparse CSR layout."""
    rows = torch.div(positions, shape[1], rounding_mode="floor")
    starts = torch.zeros(shape[0] + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(rows, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, positions % shape[1], values, shape)


class SparseLinear(nn.Module):
    """Inference-only `y = x W^T + b` with a packed W.

    Args:
        packed: The packed weight, one row of bytes. Kept as `weight`, so saving writes it as it was read.
        spec: How to read it; its shape is (out, in), or (in, out) if `transposed`.
        bias: Shape (out,), or None.
        dtype: Dtype of the product, float32 or float64.
        transposed: The layer is a GPT-2 `Conv1D`, which stores W^T.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """

    def __init__(
        self,
        packed: Tensor,
        spec: TensorSpec,
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
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = bias
        self.matrix = to_csr(positions, values.to(dtype), (rows, columns))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = x.reshape(-1, self.in_features)
        y = torch.sparse.mm(self.matrix, flat.T).T
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        density = self.matrix.values().numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.3f}"
