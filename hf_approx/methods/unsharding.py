"""The way from a model that `fully_shard` split over processes to one that can be finalized and saved."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_approx.methods.latent import hold
from hf_approx.methods.stack import MethodStack
from hf_approx.modules.bank import banks_of, set_banks
from hf_approx.modules.sharded import is_sharded, whole

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What `torch.compile` and activation checkpointing put into the names of parameters."""


class Unsharded:
    """A copy on the CPU of a model and its methods, without memory until it is filled.

    What `fully_shard` took over cannot be baked. So this is made before sharding, and filled when training is over:

        stack = hf_approx.attach(model, [config])
        twin = Unsharded(stack)
        for block in model.encoder.layer:
            fully_shard(block)
        fully_shard(model)
        optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=1e-4), steps=1000)
        ...  # train
        if twin.fill(stack):  # on all processes; True on the first
            twin.stack.finalize()
            twin.model.save_pretrained("there")

    The sharded model computes with the fixed masks and precisions as before and can be evaluated on.

    Args:
        stack: At work on the model.

    Attributes:
        stack: The copy.
        model: Its model.

    Raises:
        ValueError: The model is sharded already.
    """

    def __init__(self, stack: MethodStack) -> None:
        model = stack.model
        if is_sharded(model):
            raise ValueError("Unsharded: make the copy before fully_shard, right after attaching the methods.")
        for method in stack.methods:
            method.release()
        stack.unstack()
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers(), *stack.tensors().values()):
            memo[id(tensor)] = _hollow(tensor)
        # A copy of a model leaves behind what is trained in the place of its parameters, and templates: the copy of
        # the stack is given that.
        self.stack, latents, banks = copy.deepcopy((stack, stack.latents, banks_of(model)), memo)
        for latent in latents:
            hold(latent)
        self.model = self.stack.model
        set_banks(self.model, banks)
        for module in self.model.modules():
            if parametrize.is_parametrized(module):
                # Baking takes the weight away from the class, which the copy of a module shares with it.
                cls = type(module)
                module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))

    @torch.no_grad()
    def fill(self, stack: MethodStack) -> bool:
        """Fill the copy on the first process, gathering one tensor at a time. All processes must call this.

        Args:
            stack: At work on the sharded model; its methods are settled first.

        Returns:
            Whether this is the first process; the copy of any other stays empty.
        """
        if not stack.is_final:
            stack.settle()
        stack.follow()
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        theirs, mine = _tensors(stack), _tensors(self.stack)
        for name, tensor in mine.items():
            value = whole(theirs[name].detach())
            if first:
                tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
                tensor.copy_(value)
        if first:
            for method, other in zip(self.stack.methods, stack.methods, strict=True):
                vars(method).update({k: v for k, v in vars(other).items() if isinstance(v, (bool, int, float))})
                method.load_state_dict(other.state_dict())
            for latent in self.stack.latents:
                effective = latent.effective
                effective.untyped_storage().resize_(effective.numel() * effective.element_size())
            self.stack.write()
        return first


def _tensors(stack: MethodStack) -> dict[str, Tensor]:
    """All of a model and its methods but the effective weights, which are made of the others."""
    made = {id(latent.effective) for latent in stack.latents}
    named = (*stack.model.named_parameters(), *stack.model.named_buffers())
    plain = {f"model.{_plain_name(name)}": tensor for name, tensor in named if id(tensor) not in made}
    return {**plain, **stack.tensors()}


def _hollow(tensor: Tensor) -> Tensor:
    copied = torch.empty(tensor.shape, dtype=tensor.dtype)
    copied.untyped_storage().resize_(0)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _plain_name(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
