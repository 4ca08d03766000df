"""Quantization of what a layer is given."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_approx.axes import feature_dim
from hf_approx.modules.bank import Template

NAME = "input_quantizer"
"""The submodule of a layer that quantizes its input."""


class ActivationQuantizer(nn.Module):
    """Clips to a limit and rounds to a grid of few bits, for a whole tensor or each channel of it.

    Signed: the 2^bits odd multiples of limit / (2^bits - 1), so zero is no value. Not signed: the 2^bits multiples of
    limit / (2^bits - 1) from zero. The largest value is the limit in both.

    Args:
        channels: Number of channels with bits and limit of their own; 1: the whole tensor shares them.
        signed: Whether values may be negative.
    """

    bits: Tensor
    limit: Tensor

    def __init__(self, channels: int, signed: bool) -> None:
        super().__init__()
        self.channels, self.signed, self.dim = channels, signed, -1
        self.register_buffer("bits", torch.full((channels,), 8.0, dtype=torch.float32))
        self.register_buffer("limit", torch.ones(channels, dtype=torch.float32))

    def spread(self, values: Tensor) -> Tensor:
        """One value a channel, in a shape that fits inputs."""
        return values if self.channels == 1 else values.reshape([-1] + [1] * (-self.dim - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        limit = self.spread(self.limit)
        unit = _Rounded.apply(x.float() / limit, self.spread(self.bits), self.signed)
        return (unit * limit).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"channels={self.channels}, signed={self.signed}"


def quantized(unit: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """The nearest value of the grid whose largest value is 1."""
    steps = torch.exp2(bits) - 1
    if not signed:
        return (unit.clamp(0, 1) * steps).round() / steps
    code = ((unit.clamp(-1, 1) * steps + steps) / 2).round()
    return (2 * code - steps) / steps


class _Rounded(torch.autograd.Function):
    """`quantized`, with the gradient of the clipping alone: the layers before train on."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, bits: Tensor, signed: bool) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.low = -1.0 if signed else 0.0
        return quantized(unit, bits, signed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return torch.where((unit >= ctx.low) & (unit <= 1), grads[0], 0.0), None, None


def input_channels(layer: nn.Module) -> int | None:
    """How many channels a layer's input has; None if it is no layer that computes with its input: a lookup, say."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return int(layer.in_channels)
    weight = getattr(layer, "weight", None)
    if isinstance(layer, (nn.Embedding, Template)) or not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    return int(weight.shape[feature_dim(layer, "in")])


def install(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Make a layer quantize its input: as the submodule `input_quantizer`, in the place of one it has already.

    Channels are the last dimension of the input, or the one before the spatial dimensions of a convolution.
    """
    quantizer.dim = -len(layer.kernel_size) - 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    installed = hasattr(layer, NAME)
    setattr(layer, NAME, quantizer)
    if not installed:
        layer.register_forward_pre_hook(_quantize_input)


def uninstall(layer: nn.Module) -> None:
    """Undo `install`."""
    delattr(layer, NAME)
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _quantize_input]:
        del hooks[key]


def _quantize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.get_submodule(NAME)(args[0]), *args[1:])
