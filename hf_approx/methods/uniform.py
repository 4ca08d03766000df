"""The same number of bits for every weight: rounding after training, and training with rounded weights.

Baselines to beat, behind the interface of every method. The scales that training starts from, or that rounding uses,
minimize the squared error; training them is LSQ (Esser et al., "Learned Step Size Quantization", 2020).
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from hf_approx.finite import refuse_not_finite
from hf_approx.methods.base import MethodConfig, incoming
from hf_approx.methods.grids import GridMethod
from hf_approx.methods.latent import value_of
from hf_approx.methods.rounding import GridWeight, fit_scale, parts_shape
from hf_approx.modules.sharded import write
from hf_approx.packing.grid import MAX_BITS
from hf_approx.targets import Target


@dataclass
class UniformQuantizationConfig(MethodConfig):
    """Round every weight to the same number of bits, from the first step of training or after the last.

    Raises:
        ValueError: A value is out of range.
    """

    bits: int = field(default=4, metadata={"help": "Of every weight."})
    mode: Literal["qat", "round"] = field(
        default="qat", metadata={"help": "'qat': train rounded weights, straight through; 'round': after training."}
    )
    scale_granularity: Literal["group", "channel", "tensor"] = field(
        default="channel", metadata={"help": "What has a scale of its own, stored in float16."}
    )
    group_size: int = field(default=128, metadata={"help": "Inputs in a group, at most."})
    scale_lr: float = field(default=1e-3, metadata={"help": "Adam's learning rate, for the logarithms of the scales."})

    def __post_init__(self) -> None:
        where = "UniformQuantizationConfig"
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"{where}: bits must be a whole number from 1 to {MAX_BITS}, got {self.bits!r}.")
        if self.mode not in ("qat", "round"):
            raise ValueError(f"{where}: mode must be 'qat' or 'round', got {self.mode!r}.")
        if self.scale_granularity not in ("group", "channel", "tensor"):
            raise ValueError(
                f"{where}: scale_granularity must be group, channel or tensor, got {self.scale_granularity!r}."
            )
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"{where}: group_size must be a whole number >= 1, got {self.group_size!r}.")
        if not 0 <= self.scale_lr < math.inf:
            raise ValueError(f"{where}: scale_lr must be a finite number >= 0, got {self.scale_lr}.")

    def build(self) -> "UniformQuantization":
        """The method this config describes."""
        return UniformQuantization(self)


class LateGridWeight(GridWeight):
    """w -> w until `round` is called; then what `GridWeight` does."""

    late = True

    def round(self, weight: Tensor) -> None:
        """Fit the scale to the weight and round from now on."""
        write(self.log_scale, fit_scale(weight, self.bits, self.log_scale.shape).log())
        self.late = False

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        return weight if self.late else super().forward(weight)

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """As of `Stage`."""
        return grad if self.late else super().pull(grad, weight, value)


class UniformQuantization(GridMethod):
    """See [`UniformQuantizationConfig`]."""

    name = "uniform"

    def __init__(self, config: UniformQuantizationConfig) -> None:
        super().__init__()
        self._config = config

    @property
    def config(self) -> UniformQuantizationConfig:
        """The config that built this object."""
        return self._config

    def stage(self, name: str, target: Target) -> GridWeight:
        """The grid that fits the weight best."""
        config, weight = self._config, value_of(target)
        bits = torch.full([1] * weight.dim(), config.bits, dtype=torch.uint8, device=weight.device)
        parts = parts_shape(target, config.scale_granularity, config.group_size)
        if config.mode == "round":
            return LateGridWeight(bits, torch.ones(parts, device=weight.device), False, weight.dtype)
        return GridWeight(bits, fit_scale(weight, bits, parts), True, weight.dtype)

    def param_groups(self) -> list[dict[str, Any]]:
        """The scales, if weights are rounded in training."""
        scales = [cast(GridWeight, stage).log_scale for stage in self.stages.values()]
        return [{"params": scales, "lr": self._config.scale_lr}] if self._config.mode == "qat" else []

    def on_step(self, progress: float) -> None:
        """Nothing changes while training."""

    def settle(self) -> None:
        """Round weights that are not rounded yet; bits are fixed from the start."""
        self.reshard()
        late = {n: s for n, s in self.stages.items() if isinstance(s, LateGridWeight) and s.late}
        refuse_not_finite(self.name, ((self.targets[n].name, incoming(self.targets[n], s)) for n, s in late.items()))
        for name, rounding in late.items():
            rounding.round(incoming(self.targets[name], rounding))

    @property
    def is_final(self) -> bool:
        """Whether weights are rounded."""
        return not any(isinstance(s, LateGridWeight) and s.late for s in self.stages.values())

    @property
    def after_training(self) -> bool:
        """Whether weights are rounded after training."""
        return self._config.mode == "round"

    def metrics(self) -> dict[str, float]:
        """The bits of every weight."""
        return {"bits": float(self._config.bits)}
