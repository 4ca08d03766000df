"""Training a sparse model without losing its zeros.

Which weights are zero is written down when training starts: at the first gradient, or the first optimizer step. From
then on their gradient is zero, so that clipping, norms and momentum are those of the sparse model, and after every
step of whatever optimizer they are zero again: Muon and its like mix gradients, others add noise.
"""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

_zeros: dict[int, Tensor | None] = {}
"""By id of a parameter: where it is zero, a byte a weight; None until training starts."""
_hooks: dict[int, RemovableHandle] = {}
"""By id of a parameter: what masks its gradient."""


def keep_zeros(model: PreTrainedModel) -> None:
    """Let no optimizer move the weights of a packed model that are zero.

    Loading and `attach_packing` do this already, for parameters that are frozen too. Call it on a `copy.deepcopy`,
    which is made of other parameters, and where you wrote to weights yourself in the middle of training: what is zero
    when training goes on is what stays zero.

    Args:
        model: A model loaded from a packed checkpoint, or one `attach_packing` was called on.

    Raises:
        ValueError: The model is neither.
    """
    config = getattr(model.config, "quantization_config", None)
    tensors = getattr(config, "tensors", None)
    if tensors is None:
        raise ValueError("keep_zeros: the model is not packed; load it from a packed checkpoint.")
    for name, param in model.named_parameters(remove_duplicate=False):
        if holds_zeros(param) or (name in tensors and tensors[name].sparsity > 0):
            hold_zeros(param)


def hold_zeros(param: nn.Parameter) -> None:
    """Let no optimizer move the weights that are zero when training next goes on."""
    if not holds_zeros(param):
        _mask_gradients(param, param)
        weakref.finalize(param, _forget, id(param)).atexit = False
    _zeros[id(param)] = None
    _follow_optimizers()


def move_zeros(param: nn.Parameter, other: nn.Parameter) -> None:
    """Let optimizers leave the zeros of another parameter alone.

    Args:
        param: Has the gradient.
        other: Of its shape, and trained in its place.
    """
    _zeros[id(other)] = _zeros.pop(id(param))
    weakref.finalize(other, _forget, id(other)).atexit = False
    _mask_gradients(param, other)


def release_zeros(param: nn.Parameter) -> None:
    """Let optimizers move all weights of a parameter."""
    _forget(id(param))


def _forget(key: int) -> None:
    _zeros.pop(key, None)
    if key in _hooks:
        _hooks.pop(key).remove()


def _mask_gradients(param: nn.Parameter, like: nn.Parameter) -> None:
    """Let a parameter have no gradient where another is zero."""
    if id(param) in _hooks:
        _hooks.pop(id(param)).remove()
    frozen = not param.requires_grad
    if frozen:
        # A hook that is registered now works once the parameter is trained.
        param.requires_grad_(True)
    _hooks[id(param)] = param.register_hook(functools.partial(_mask_gradient, weakref.ref(like)))
    if frozen:
        param.requires_grad_(False)


def holds_zeros(tensor: Tensor) -> bool:
    """Whether optimizers leave the zeros of this parameter alone."""
    return id(tensor) in _zeros


def note_zeros(model: nn.Module) -> None:
    """Write down now which weights are zero, before a checkpoint of the training is loaded."""
    for param in model.parameters():
        if holds_zeros(param):
            _where_zero(param)


@torch.no_grad()
def release_filled(model: nn.Module, *args: Any) -> None:
    """Let weights move again to which other values were given; a hook for after `load_state_dict`."""
    for param in model.parameters():
        if _zeros.get(id(param)) is not None:
            _zeros[id(param)] = _where_zero(param) & (param == 0)


@torch.no_grad()
def _where_zero(param: Tensor) -> Tensor:
    zeros = _zeros[id(param)]
    if zeros is None or zeros.shape != param.shape:
        zeros = param == 0
    _zeros[id(param)] = zeros = zeros.to(param.device)
    return zeros


def _mask_gradient(reference: weakref.ref[nn.Parameter], grad: Tensor) -> Tensor:
    param = reference()
    if param is None or not holds_zeros(param) or grad.is_sparse:
        return grad
    return grad.masked_fill(_where_zero(param), 0)


@functools.cache
def _follow_optimizers() -> None:
    """Once a process: no optimizer has to be told of the parameters it holds."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


@torch.compiler.disable
def _before_step(optimizer: Optimizer, *args: Any) -> None:
    for param in _held(optimizer):
        _where_zero(param)


@torch.compiler.disable
@torch.no_grad()
def _after_step(optimizer: Optimizer, *args: Any) -> None:
    for param in _held(optimizer):
        param.masked_fill_(_where_zero(param), 0)


def _held(optimizer: Optimizer) -> list[Tensor]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return [param for param in params if holds_zeros(param)]
