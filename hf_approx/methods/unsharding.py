"""The way from a model that `fully_shard` split over processes to one that can be finalized and saved."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_approx.methods.base import Method
from hf_approx.modules.sharded import is_sharded, reshard, whole

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What `torch.compile` and activation checkpointing put into the names of parameters."""


class Unsharded:
    """A copy on the CPU of a model and its methods, without memory until it is filled.

    What `fully_shard` took over cannot be baked. So this is made before sharding, and filled when training is over:

        twin = Unsharded(model, [method])
        for block in model.encoder.layer:
            fully_shard(block)
        fully_shard(model)
        ...  # train
        if twin.fill(model, [method]):  # on all processes; True on the first
            names = twin.methods[0].finalize()
            twin.model.save_pretrained("there")

    The sharded model computes with the fixed masks and precisions as before and can be evaluated on.

    Args:
        model: The methods are attached to it.
        methods: In the order they were attached.

    Attributes:
        model: The copy.
        methods: Those on the copy.

    Raises:
        ValueError: The model is sharded already.
    """

    def __init__(self, model: nn.Module, methods: Sequence[Method]) -> None:
        if is_sharded(model):
            raise ValueError("Unsharded: make the copy before fully_shard, right after attaching the methods.")
        for method in methods:
            method.release()
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            memo[id(tensor)] = _hollow(tensor)
        self.model, self.methods = copy.deepcopy((model, list(methods)), memo)
        for module in self.model.modules():
            if parametrize.is_parametrized(module):
                # Baking takes the weight away from the class, which the copy of a module shares with it.
                cls = type(module)
                module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))

    @torch.no_grad()
    def fill(self, model: nn.Module, methods: Sequence[Method]) -> bool:
        """Fill the copy on the first process, gathering one tensor at a time. All processes must call this.

        Args:
            model: The sharded model.
            methods: At work on it; they are settled first.

        Returns:
            Whether this is the first process; the copy of any other stays empty.
        """
        for method in methods:
            if not method.is_final:
                method.settle()
        reshard(model)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        theirs = {_plain_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            value = whole(theirs[name].detach())
            if first:
                tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
                tensor.copy_(value)
        for mine, method in zip(self.methods, methods, strict=True):
            state = method.state_dict()
            vars(mine).update({k: v for k, v in vars(method).items() if isinstance(v, (bool, int, float))})
            mine.load_state_dict(state)
        return first


def _hollow(tensor: Tensor) -> Tensor:
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    copied.untyped_storage().resize_(0)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
