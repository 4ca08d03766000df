"""The dtype that the weights of a packed model are stored in, and those that it cannot hold."""

from collections.abc import Mapping

import torch
from torch import Tensor

HALF = 2
"""Bytes of half precision. Weights of less, such as float8, are stored as they are."""


def overflowing(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """The first name whose tensor has a value that becomes infinite in `dtype`; None if all fit."""
    largest = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        if is_rounded(tensor) and torch.finfo(tensor.dtype).max > largest and tensor.numel():
            # Rounded first: what is only a little larger than the largest number becomes it.
            rounded = tensor.detach().abs().max().to(dtype)
            if bool(rounded.isinf()):
                return name
    return None


def is_rounded(tensor: Tensor) -> bool:
    """Whether a parameter is stored in the dtype of the config, and not in its own."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= HALF
