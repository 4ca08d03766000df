"""A linear layer that multiplies by the CSR form of its packed weight."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_approx.packing import SparseSpec, unpack_parts

MAX_DENSITY = 0.15
"""Above this density torch's dense product on a CPU is faster than its CSR product for some batch sizes."""


class SparseLinear(nn.Module):
    """Inference-only `y = x W^T + b` with a sparse W.

    The matrix is held as three plain tensors, which can be copied, cast and moved; one of CSR layout cannot. The state
    dict holds the packed bytes in their place, so saving writes what was read.

    Args:
        packed: The packed weight, one row of bytes.
        spec: How to read it; its shape is (out, in), or (in, out) if `transposed`.
        bias: Shape (out,), or None.
        dtype: Dtype of the weight, float32 or float64.
        transposed: The layer is a GPT-2 `Conv1D`, which stores W^T.

    Raises:
        PackedFormatError: The bytes are not what the spec says.
    """

    packed: Tensor
    starts: Tensor
    columns: Tensor
    values: Tensor

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
        # MKL computes with 32-bit indices and would convert wider ones at every product.
        index = torch.int32 if values.numel() < 2**31 else torch.int64
        starts = torch.zeros(rows + 1, dtype=index)
        starts[1:] = torch.bincount(positions // columns, minlength=rows).cumsum(0)
        parts = starts, (positions % columns).to(index), values.to(dtype)
        with warnings.catch_warnings():  # once in a process, and not in `forward`, which would bring others back
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            torch.sparse_csr_tensor(*parts, (rows, columns), check_invariants=True)
        for name, tensor in zip(("packed", "starts", "columns", "values"), (packed, *parts), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The CSR matrix of shape (out, in), whatever layout the original layer stored."""
        shape = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.starts, self.columns, self.values, shape, check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), computed in float32 or float64, in the dtype of `x`.

        Raises:
            RuntimeError: In training mode, unless gradients are disabled.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "SparseLinear: layers that stay packed are not trained; load the model with runtime='dense' to train "
                "it, or call model.eval()."
            )
        # torch has no sparse product in half precision on a CPU.
        dtype = torch.promote_types(self.values.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.weight.to(dtype)
            y = torch.sparse.mm(weight, x.reshape(-1, self.in_features).to(dtype).T).T
        if self.bias is not None:
            y = y + self.bias
        if y.requires_grad:
            y.register_hook(_warn_of_no_gradient)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        density = self.values.numel() / (self.in_features * self.out_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.3f}"


class ParameterCount:
    """`num_parameters` of a model in which weights stay packed: they count as they do when they are decoded.

    An object and no function, so that a copy of the model counts itself.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As `PreTrainedModel.num_parameters`; what stays packed is not trainable."""
        count = type(self.model).num_parameters(self.model, only_trainable, exclude_embeddings)
        packed = [module for module in self.model.modules() if isinstance(module, SparseLinear)]
        return count if only_trainable else count + sum(m.out_features * m.in_features for m in packed)


def _warn_of_no_gradient(gradient: Tensor) -> None:
    warnings.warn(
        "Layers that stay packed pass gradients on to their input and bias, but their weights get none: load the "
        "model with runtime='dense' to train it.",
        stacklevel=2,
    )
