"""Parameters that `torch.distributed.fsdp.fully_shard` splits over processes.

In the forward pass of a layer its parameters are whole. Outside of it they are `DTensor`s, of which each process holds
some rows: a piece. Schedules work on pieces and add up what they count, or on one whole tensor at a time, so that no
device ever holds the whole model. Every function here takes ordinary tensors too: their only piece is the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the pieces of all processes; differentiable."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    _shard_dim(tensor)
    return tensor.to_local()


def piece_of(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole value that belongs to this process's piece of `like`.

    Args:
        value: In a shape that broadcasts to that of `like`.
        like: A tensor, split or not; then the value is returned as it is.
    """
    if not isinstance(like, DTensor):
        return value
    start, rows = _start(like), like.to_local().shape[0]
    return value.expand(like.shape)[start : start + rows]


@torch.no_grad()
def write(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor: each process its piece."""
    piece(tensor).copy_(piece_of(value, tensor))


def total(value: Tensor, like: Tensor) -> Tensor:
    """The sum of the values that the processes found in their pieces of `like`."""
    if not isinstance(like, DTensor):
        return value
    shared = _shard_dim(like)
    summed: list[Placement] = [Partial() if dim == shared else Replicate() for dim in range(like.device_mesh.ndim)]
    return DTensor.from_local(value, like.device_mesh, summed, run_check=False).full_tensor()


def totals(values: Sequence[Tensor], likes: Sequence[Tensor]) -> Tensor:
    """As `total`, for many scalars at once: shape (number of tensors,)."""
    found = torch.stack([value.to(values[0].device) for value in values])
    split = [i for i, like in enumerate(likes) if isinstance(like, DTensor)]
    if split:
        found[split] = total(found[split], likes[split[0]])
    return found


def by_piece(value: Tensor, like: Tensor) -> tuple[Tensor, int]:
    """The values that the processes found, in the order of their pieces, and which of them is this process's."""
    if not isinstance(like, DTensor):
        return value.reshape(1), 0
    dim = _shard_dim(like)
    rank = like.device_mesh.get_local_rank(dim)
    values = torch.zeros(like.device_mesh.size(dim), dtype=value.dtype, device=value.device)
    values[rank] = value
    return total(values, like), rank


def joined(values: Tensor, like: Tensor) -> Tensor:
    """What the pieces, all shaped like those of `like`, are together; of dtype bool."""
    if not isinstance(like, DTensor):
        return values
    result = torch.zeros(like.shape, dtype=torch.uint8, device=values.device)
    start = _start(like)
    result[start : start + len(values)] = values
    return total(result, like).bool()


def every(tensor: Tensor, stride: int) -> Tensor:
    """Every so manieth entry of the whole tensor, in one dimension, without gathering the others."""
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)[::stride]
    start = _start(tensor) * (tensor.numel() // max(tensor.shape[0], 1))
    first = -start % stride
    found = tensor.to_local().reshape(-1)[first::stride]
    sample = torch.zeros(-(-tensor.numel() // stride), dtype=tensor.dtype, device=found.device)
    at = (start + first) // stride
    sample[at : at + len(found)] = found
    return total(sample, tensor)


def reshard(model: nn.Module) -> None:
    """Make every split parameter of a model a `DTensor` again.

    A forward pass without a backward pass leaves some whole, and what is written to them then is lost.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was called on any part of a model."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def _shard_dim(tensor: DTensor) -> int:
    """The dimension of the mesh that a tensor is split over; raises `ValueError` unless it is split by rows."""
    split = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    if len(split) != 1 or not tensor.placements[split[0]].is_shard(0):
        raise ValueError(
            f"Compression methods need parameters split along their first dimension, not {tensor.placements}; "
            "shard with fully_shard and its default placement, without tensor parallelism."
        )
    return split[0]


def _start(tensor: DTensor) -> int:
    """The first row of this process's piece."""
    _shard_dim(tensor)
    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1][0]
