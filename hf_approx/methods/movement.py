"""Movement pruning (Sanh, Wolf and Rush, NeurIPS 2020): a baseline for fine-tuning pretrained models.

Each weight has a score that gradient descent moves by -w dL/dw', as if there were no mask (straight through):
weights that move away from zero stay, whatever their size.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hf_approx.finite import refuse_not_finite
from hf_approx.methods.base import Method, MethodConfig
from hf_approx.methods.budget import Sparsity, check_fraction, check_target, cubic_ramp, plan, threshold, top_masks
from hf_approx.methods.latent import Stage, add_grad
from hf_approx.modules.sharded import piece, summed, totals
from hf_approx.targets import Target


@dataclass
class MovementPruningConfig(MethodConfig):
    """Keep the weights that moved away from zero: the top scores, or those above a threshold.

    Raises:
        ValueError: A value is out of range.
    """

    target_sparsity: Sparsity = field(
        default=0.9, metadata={"help": "Fraction of weights removed at the end, over all targets or by pattern."}
    )
    mode: Literal["top_k", "soft"] = field(
        default="top_k",
        metadata={
            "help": "'top_k': the top scores, along a cubic ramp. 'soft': scores above `threshold`, pushed down by "
            "`penalty`; the mask is corrected to the target when it is fixed."
        },
    )
    ramp_fraction: float = field(
        default=0.75, metadata={"help": "Part of training the mask changes; the rest fine-tunes."}
    )
    mask_lr: float = field(default=1e-2, metadata={"help": "Adam's learning rate for the scores."})
    threshold: float = field(default=0.1, metadata={"help": "Soft: the sigmoid(score) a weight needs to stay."})
    penalty: float = field(default=100.0, metadata={"help": "Soft: the loss gets penalty * mean sigmoid(score)."})

    def __post_init__(self) -> None:
        where = "MovementPruningConfig"
        check_target(where, self.target_sparsity)
        check_fraction(where, "ramp_fraction", self.ramp_fraction)
        check_fraction(where, "threshold", self.threshold, 1e-6, 0.5)
        if self.mode not in ("top_k", "soft"):
            raise ValueError(f"{where}: mode must be 'top_k' or 'soft', got {self.mode!r}.")
        for name in ("mask_lr", "penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{where}: {name} must be a finite number >= 0, got {getattr(self, name)}.")

    def build(self) -> "MovementPruning":
        """The method this config describes."""
        return MovementPruning(self)


class MovementMask(Stage):
    """w -> 1[score >= threshold] * w, with the gradient of the mask passed to the score as it is.

    Infinite scores are settled: they pass no gradient.
    """

    threshold: Tensor
    may_be_infinite = ("scores", "threshold")

    def __init__(self, weight: Tensor, start: float) -> None:
        super().__init__()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.scores = nn.Parameter(torch.zeros_like(weight, dtype=dtype))
        self.register_buffer("threshold", torch.tensor(start, dtype=dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        return weight * (self.scores >= self.threshold)

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """As of `Stage`; the score gets the gradient of its mask, whatever that is."""
        scores = self.scores.detach()
        add_grad(self.scores, (grad * weight).to(scores.dtype).masked_fill_(scores.isinf(), 0))
        return grad * (scores >= self.threshold)


class MovementPruning(Method):
    """See [`MovementPruningConfig`]."""

    name = "movement"

    def __init__(self, config: MovementPruningConfig) -> None:
        super().__init__()
        self._config = config
        self._settled = False

    @property
    def config(self) -> MovementPruningConfig:
        """The config that built this object."""
        return self._config

    @property
    def masks(self) -> list[MovementMask]:
        """The mask of every target, in the model's order."""
        return [cast(MovementMask, stage) for stage in self.stages.values()]

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless every module has a target."""
        plan(names, self._config.target_sparsity, "global")

    def stage(self, name: str, target: Target) -> MovementMask:
        """A mask of ones: all scores start at zero, above the threshold."""
        t = self._config.threshold
        start = -math.inf if self._config.mode == "top_k" else min(math.log(t / (1 - t)), -1e-6)
        return MovementMask(target.value, start)

    def param_groups(self) -> list[dict[str, Any]]:
        """The scores, at the mask learning rate."""
        return [{"params": [mask.scores for mask in self.masks], "lr": self._config.mask_lr}]

    def penalty(self) -> Tensor | None:
        """Soft: penalty * mean sigmoid(score), until the mask is fixed."""
        if self._settled or self._config.mode != "soft":
            return None
        scores = [mask.scores for mask in self.masks]
        total = summed([piece(s).sigmoid().sum() for s in scores], scores)
        return self._config.penalty * total / sum(s.numel() for s in scores)

    @torch.no_grad()
    def on_step(self, progress: float) -> None:
        """Top-k: raise the thresholds along the cubic ramp. Both: fix the mask at its end."""
        if self._settled:
            return
        self.reshard()
        ramp = self._config.ramp_fraction
        if progress >= ramp:
            self.settle()
        elif self._config.mode == "top_k":
            masks = self.masks
            for group in plan(list(self.targets), self._config.target_sparsity, "global"):
                wanted = cubic_ramp(progress / ramp, group.target)
                if wanted > 0:
                    value = threshold([masks[i].scores for i in group.members], wanted)
                    for i in group.members:
                        masks[i].threshold.copy_(value)

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the top scores and fix that mask."""
        if not self._settled:
            scores = (mask.scores for mask in self.masks)
            refuse_not_finite(self.name, zip((f"{name}.scores" for name in self.targets), scores, strict=True))
        self.reshard()
        groups = plan(list(self.targets), self._config.target_sparsity, "global")
        for mask, keep in zip(self.masks, top_masks([m.scores for m in self.masks], groups), strict=True):
            piece(mask.scores).copy_(torch.where(keep, math.inf, -math.inf))
            mask.threshold.zero_()
        self._settled = True

    @property
    def is_final(self) -> bool:
        """Whether the mask is fixed."""
        return self._settled

    @property
    def settles_at(self) -> float:
        """The end of the ramp."""
        return self._config.ramp_fraction

    def metrics(self) -> dict[str, float]:
        """Sparsity of the mask and, in soft mode, the penalty in the loss."""
        scores = [mask.scores.detach() for mask in self.masks]
        above = [(piece(s) >= mask.threshold).sum() for s, mask in zip(scores, self.masks, strict=True)]
        sparsity = {"sparsity": 1 - int(totals(above, scores).sum()) / sum(s.numel() for s in scores)}
        with torch.no_grad():
            penalty = self.penalty()
        return sparsity if penalty is None else {**sparsity, "penalty": float(penalty)}

    def state_dict(self) -> dict[str, Any]:
        """The phase; scores and thresholds are in the model."""
        return {"settled": self._settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._settled = state["settled"]
