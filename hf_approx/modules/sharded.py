"""Parameters that `torch.distributed.fsdp.fully_shard` splits over processes.

In the forward pass of a layer its parameters are whole. Outside of it they are `DTensor`s, of which each process holds
some rows: a piece. What is trained in their place, and masks and limits with a number for each weight, are split
alike; whatever is smaller, such as the scales of a group, is whole on every process. What turns one into the other
works on rows, schedules work on pieces and add up what they count, or on one whole tensor at a time, so that no device
ever holds the whole model. Every function here takes ordinary tensors too: their only piece is the whole.
"""

from collections.abc import Iterable, Sequence
from typing import TypeVar, cast

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


def from_piece(rows: Tensor, like: DTensor) -> DTensor:
    """What the rows that the processes hold are together, split as `like` is; differentiable."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def split(tensor: Tensor, like: DTensor) -> Tensor:
    """A tensor that every process has whole, in pieces: of each only its own remains, in memory of its own.

    Args:
        tensor: Of the shape of `like`; a parameter remains one.
        like: Says how.
    """
    rows = piece_of(tensor, like).to(like.device, copy=True, memory_format=torch.contiguous_format)
    made = from_piece(rows, like)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def split_alike(module: nn.Module, like: DTensor) -> None:
    """Split those tensors of a module that have a number for each entry of a weight; bring the others where it is."""
    held: dict[str, Tensor | None]
    for held in (module._parameters, module._buffers):  # type: ignore[assignment]
        for name, tensor in held.items():
            if tensor is None or isinstance(tensor, DTensor):
                continue
            # A weight with one entry a row has no more of them than its rows have scales.
            if tensor.shape == like.shape and tensor.numel() > tensor.shape[0]:
                held[name] = split(tensor, like)
            else:
                tensor.data = tensor.data.to(like.device)


M = TypeVar("M", bound=nn.Module)


def on_rows(module: M, like: DTensor) -> M:
    """What a module is for the rows that this process holds of a weight: it computes with them as with a whole one.

    Args:
        module: Has parts of the weight, such as scales, as those of `hf_approx.packing.grid.Grid`; what has another
            number of dimensions it sees to itself: its `rows` are the first row here, and how many there are in all.
        like: The weight.

    Returns:
        A module of the same kind; where it can, its tensors share memory with those of the given one.
    """
    made: M = object.__new__(type(module))
    vars(made).update(vars(module))
    made.rows = (_start(like), like.shape[0])  # type: ignore[assignment]
    made._parameters = {
        name: param if param is None else nn.Parameter(_part(param.detach(), like), param.requires_grad)
        for name, param in module._parameters.items()
    }
    made._buffers = {
        name: buffer if buffer is None else _part(buffer, like) for name, buffer in module._buffers.items()
    }
    return made


def _part(parts: Tensor, like: DTensor) -> Tensor:
    if isinstance(parts, DTensor):
        return parts.to_local()
    at = _place(parts, like)
    return parts if at is None else parts[at]


def _place(parts: Tensor, like: DTensor) -> slice | Tensor | None:
    """Which of the parts govern rows that are here: a range, or one for each row; None: all of them."""
    if parts.dim() != like.dim():
        return None
    start, rows, (have, want) = _start(like), like.to_local().shape[0], (parts.shape[0], like.shape[0])
    if have == 1 and want > 1:
        return slice(0, min(rows, 1))
    run = -(-want // have)
    if start % run == 0 and rows % run == 0:
        return slice(start // run, (start + rows) // run)
    return torch.arange(start, start + rows, device=parts.device) // run


def hand_back(rows: nn.Module, module: nn.Module, like: DTensor) -> list[tuple[Tensor, Tensor, DTensor]]:
    """Give the parameters of a module the gradients of those that `on_rows` made of them.

    Returns:
        Of those that are whole on every process: what `add_totals` takes.
    """
    partials: list[tuple[Tensor, Tensor, DTensor]] = []
    for name, param in module._parameters.items():
        grad = None if param is None else cast(nn.Parameter, rows._parameters[name]).grad
        if param is None or grad is None:
            continue
        if isinstance(param, DTensor):
            found = from_piece(grad, like)
            param.grad = found if param.grad is None else param.grad + found
            continue
        at = _place(param, like)
        if at is not None:
            everywhere = torch.zeros_like(param)
            if isinstance(at, slice):
                everywhere[at] = grad
            else:
                everywhere.index_add_(0, at, grad)
            grad = everywhere
        partials.append((param, grad, like))
    return partials


@torch.no_grad()
def add_totals(found: Iterable[tuple[Tensor, Tensor, DTensor]]) -> None:
    """Give parameters that are whole on every process the gradients that the processes found for them, added up.

    Args:
        found: Parameter, what this process found from its rows, and the weight they are rows of. All processes have
            the same parameters in the same order.
    """
    groups: dict[tuple[object, torch.dtype, torch.device], list[tuple[Tensor, Tensor, DTensor]]] = {}
    for param, grad, like in found:
        groups.setdefault((like.device_mesh, grad.dtype, grad.device), []).append((param, grad, like))
    for entries in groups.values():
        flat = total(torch.cat([grad.reshape(-1) for _, grad, _ in entries]), entries[0][2])
        for (param, grad, _), part in zip(entries, flat.split([g.numel() for _, g, _ in entries]), strict=True):
            summed = part.reshape(grad.shape)
            param.grad = summed.clone() if param.grad is None else param.grad + summed


def summed(values: Sequence[Tensor], likes: Sequence[Tensor]) -> Tensor:
    """The sum of scalars that each process found in its pieces, and of those of the others.

    Its gradient is that of the scalars here: what the others found is a constant, and they have its gradient.
    """
    here = torch.stack([value.to(values[0].device) for value in values]).sum()
    with torch.no_grad():
        everywhere = totals([value.detach() for value in values], likes).sum()
    return here + (everywhere - here.detach()) if any(isinstance(like, DTensor) for like in likes) else here


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
    """Copy a value, whole or split as the tensor is, into a tensor: each process its piece."""
    piece(tensor).copy_(piece(value) if isinstance(value, DTensor) else piece_of(value, tensor))


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


def every(tensor: Tensor, stride: int, stacked: bool = False) -> Tensor:
    """Every so manieth entry of the whole tensor, in one dimension, without gathering the others.

    Args:
        tensor: Split or not.
        stride: So many.
        stacked: The entries are counted anew for each of several tensors that are stacked in its first dimension.
    """
    if not isinstance(tensor, DTensor):
        return tensor.reshape(len(tensor) if stacked else 1, -1)[:, ::stride].reshape(-1)
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
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
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


def take_from_first(tensor: Tensor) -> None:
    """Copy a tensor from the first process to all others; one that is split over them is nobody's alone."""
    if isinstance(tensor, DTensor) or not tensor.numel():
        return
    values = tensor.detach().reshape(-1).contiguous()
    # Not every backend sends every dtype, and all send bytes.
    torch.distributed.broadcast(values.view(torch.uint8), 0)
    tensor.copy_(values.view_as(tensor))
