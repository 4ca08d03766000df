"""Training a quantized model on with the precisions it has: SMOL's second phase as a run of its own."""

import math
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_approx.checkpoint.quantizer import ApproxQuantizer
from hf_approx.methods.base import MethodConfig, incoming
from hf_approx.methods.grids import GridMethod
from hf_approx.methods.rounding import GridWeight, reduce, stored
from hf_approx.modules.sharded import whole
from hf_approx.packing.grid import Grid
from hf_approx.targets import Target


@dataclass
class FixedPrecisionConfig(MethodConfig):
    """Train the rounded weights of a loaded quantized model, straight through; every part keeps its bits.

    Weights that are zero stay zero, and quantized inputs of layers stay as they are.

    Raises:
        ValueError: A value is out of range.
    """

    train_scale: bool = field(default=True, metadata={"help": "Train the scales too, or keep them."})
    scale_lr: float = field(default=1e-3, metadata={"help": "Adam's learning rate, for the logarithms of the scales."})

    def __post_init__(self) -> None:
        if not 0 <= self.scale_lr < math.inf:
            raise ValueError(f"FixedPrecisionConfig: scale_lr must be a finite number >= 0, got {self.scale_lr}.")

    def build(self) -> "FixedPrecision":
        """The method this config describes."""
        return FixedPrecision(self)


class FixedPrecision(GridMethod):
    """See [`FixedPrecisionConfig`]."""

    name = "fixed_precision"

    def __init__(self, config: FixedPrecisionConfig) -> None:
        super().__init__()
        self._config = config
        self._found: dict[str, Grid] = {}

    @property
    def config(self) -> FixedPrecisionConfig:
        """The config that built this object."""
        return self._config

    def select(self, model: nn.Module) -> dict[str, Target]:
        """The parameters that have a grid; by default all of them."""
        config, quantizer = self._config, getattr(model, "hf_quantizer", None)
        packed = isinstance(model, PreTrainedModel) and isinstance(quantizer, ApproxQuantizer)
        found = cast(ApproxQuantizer, quantizer).current_grids(cast(PreTrainedModel, model)) if packed else {}
        every = config.target_modules is None and config.target_parameters is None
        targets = [
            target
            for target in (Target.of(model, name) for name in found)
            if (every or target.is_one_of(config.target_modules, config.target_parameters))
            and not target.is_one_of(config.exclude, config.exclude)
        ]
        self._found = {target.key: found[target.name] for target in targets}
        if not self._found:
            raise ValueError(
                f"FixedPrecisionConfig: {type(model).__name__} has no quantized weight to train; load a quantized "
                "model, or quantize with SmolConfig."
            )
        return {target.key: target for target in targets}

    def stage(self, name: str, target: Target) -> GridWeight:
        """The grid that the weight is on."""
        weight = target.value
        grid = self._found[name].to(weight.device)
        scale = grid.scale.float()
        # Of a model that was packed in another dtype the scales stay as they are, or its weights would change.
        dtype = weight.dtype if torch.equal(stored(scale, weight.dtype), scale) else torch.float32
        return GridWeight(grid.bits.clone(), scale, self._config.train_scale, dtype)

    def param_groups(self) -> list[dict[str, Any]]:
        """The scales, if they are trained."""
        scales = [cast(GridWeight, stage).log_scale for stage in self.stages.values()]
        return [{"params": scales, "lr": self._config.scale_lr}] if self._config.train_scale else []

    def on_step(self, progress: float) -> None:
        """Nothing changes while training."""

    def settle(self) -> None:
        """The bits are fixed from the start."""

    @property
    def is_final(self) -> bool:
        """Always: the bits are fixed from the start."""
        return True

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Average bits of the weights that are not zero."""
        kept = spent = 0.0
        for name, rounding in self.stages.items():
            bits = whole(cast(GridWeight, rounding).bits)
            counts = reduce((incoming(self.targets[name], rounding) != 0).float(), bits.shape)
            kept += float(counts.sum())
            spent += float((counts * bits).sum())
        return {"bits": spent / max(kept, 1.0)}
