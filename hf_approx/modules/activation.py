"""Quantization of a layer's input."""

from typing import Any

import torch
from torch import Tensor, nn


class ActivationQuantizer(nn.Module):
    """Rounds each channel of an input to its own number of bits.

    Args:
        channels: Number of channels, along dimension 1 of images and the last of anything else; 1 for all alike.
        signed: Values lie in [-limit, limit] instead of [0, limit].
    """

    bits: Tensor
    limit: Tensor

    def __init__(self, channels: int, signed: bool) -> None:
        super().__init__()
        self.channels, self.signed = channels, signed
        self.register_buffer("bits", torch.full((channels,), 8.0, dtype=torch.float32))
        self.register_buffer("limit", torch.ones(channels, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """The nearest value that can be represented, in the dtype of `x`."""
        shape = (-1, 1, 1) if x.dim() == 4 else (-1,)
        bits, limit = self.bits.view(shape), self.limit.view(shape)
        unit = x.float() / limit
        if self.signed:
            step = torch.exp2(2 - bits)
            value = ((torch.floor(2 * unit / step) + 0.5) * step).clamp(-2 + step / 2, 2 - step / 2) / 2
        else:
            levels = torch.exp2(bits) - 1
            value = torch.round(unit.clamp(0, 1) * levels) / levels
        return (value * limit).to(x.dtype)


def install(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first input of a layer; its bits and limits become part of the layer's state."""
    layer.add_module("input_quantizer", quantizer)
    layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.input_quantizer(inputs[0]), *inputs[1:])
