"""Pruning by the size of weights: gradual (Zhu and Gupta, "To prune, or not to prune", 2017), one-shot, random.

Baselines to beat, behind the interface of every method.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_approx.finite import refuse_not_finite
from hf_approx.methods.base import Method, MethodConfig
from hf_approx.methods.budget import Group, Scope, Sparsity, check_fraction, check_target, plan, top_masks
from hf_approx.methods.latent import Stage
from hf_approx.modules.sharded import piece, split, totals
from hf_approx.targets import Target


@dataclass
class MagnitudePruningConfig(MethodConfig):
    """Prune the smallest weights a little more at every step, along a cubic ramp.

    Raises:
        ValueError: A value is out of range.
    """

    target_sparsity: Sparsity = field(
        default=0.9, metadata={"help": "Fraction of weights removed at the end, over all targets or by pattern."}
    )
    ramp_fraction: float = field(
        default=0.75,
        metadata={"help": "Part of training the ramp takes; the rest fine-tunes. 0: one shot, before training."},
    )
    update_every: int = field(default=10, metadata={"help": "Optimizer steps between mask updates."})
    scope: Scope = field(default="global", metadata={"help": "Rank weights over all layers or in each."})
    criterion: Literal["magnitude", "random"] = field(
        default="magnitude", metadata={"help": "'random' draws the order of removal once: the floor of any method."}
    )
    seed: int = field(default=0, metadata={"help": "Of the random order."})

    def __post_init__(self) -> None:
        where = "MagnitudePruningConfig"
        check_target(where, self.target_sparsity)
        check_fraction(where, "ramp_fraction", self.ramp_fraction)
        if self.update_every < 1:
            raise ValueError(f"{where}: update_every must be at least 1, got {self.update_every}.")
        if self.scope not in ("global", "layer"):
            raise ValueError(f"{where}: scope must be 'global' or 'layer', got {self.scope!r}.")
        if self.criterion not in ("magnitude", "random"):
            raise ValueError(f"{where}: criterion must be 'magnitude' or 'random', got {self.criterion!r}.")

    def check_rounds(self) -> None:
        """Any settings will do."""

    def build(self) -> "MagnitudePruning":
        """The method this config describes."""
        return MagnitudePruning(self)


class BinaryMask(Stage):
    """w -> mask * w."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """Same shape and dtype as the weight."""
        return weight * self.mask

    def pull(self, grad: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        """As of `Stage`."""
        return grad * self.mask


class MagnitudePruning(Method):
    """See [`MagnitudePruningConfig`]."""

    name = "magnitude"

    def __init__(self, config: MagnitudePruningConfig) -> None:
        super().__init__()
        self._config = config
        self._calls = 0
        self._settled = False

    @property
    def config(self) -> MagnitudePruningConfig:
        """The config that built this object."""
        return self._config

    @property
    def _masks(self) -> list[Tensor]:
        return [cast(BinaryMask, stage).mask for stage in self.stages.values()]

    def check(self, names: list[str]) -> None:
        """Raise `ValueError` unless every module has a target."""
        plan(names, self._config.target_sparsity, self._config.scope)

    def stage(self, name: str, target: Target) -> BinaryMask:
        """A mask of ones."""
        return BinaryMask(target.value)

    def on_step(self, progress: float) -> None:
        """Raise the sparsity along the ramp; fix the mask at its end."""
        if self._settled:
            return
        ramp = self._config.ramp_fraction
        if progress >= ramp:
            self.settle()
        elif self._calls % self._config.update_every == 0:
            self._prune(progress / ramp)
        self._calls += 1

    def end_round(self, round_: int, rounds: int, legacy: bool = False) -> bool:
        """Iterative pruning: each round removes the same fraction of what was left, and rewinds.

        After round r of R, counted from 0, the density is d^((r + 1) / R).
        """
        groups = plan(list(self.targets), self._config.target_sparsity, self._config.scope)
        now = [Group(g.members, 1 - (1 - g.target) ** ((round_ + 1) / rounds)) for g in groups]
        # Weights that are gone rank last, whatever the optimizer made of them since.
        order = [order * mask for order, mask in zip(self._order(), self._masks, strict=True)]
        for buffer, mask in zip(self._masks, top_masks(order, now), strict=True):
            piece(buffer).copy_(mask)
        self._settled = round_ + 1 == rounds
        return True

    def settle(self) -> None:
        """Prune to the target and keep that mask; what is settled stays."""
        if self._settled:
            return
        self._prune(1.0)
        self._settled = True

    @torch.no_grad()
    def _prune(self, fraction: float) -> None:
        self.reshard()
        groups, order = plan(list(self.targets), self._config.target_sparsity, self._config.scope), self._order()
        for buffer, mask in zip(self._masks, top_masks(order, groups, fraction), strict=True):
            piece(buffer).copy_(mask)

    def _order(self) -> list[Tensor]:
        weights = [latent.weight.detach() for latent in self.latents]
        if self._config.criterion == "magnitude":
            # A weight that is NaN would rank above all others, and one such layer take the place of all the rest.
            refuse_not_finite(self.name, zip((target.name for target in self.targets.values()), weights, strict=True))
            return [weight.abs() for weight in weights]
        generator = torch.Generator().manual_seed(self._config.seed)
        drawn = (torch.rand(weight.shape, generator=generator) for weight in weights)
        return [
            split(order, weight) if isinstance(weight, DTensor) else order.to(weight.device)
            for order, weight in zip(drawn, weights, strict=True)
        ]

    @property
    def is_final(self) -> bool:
        """Whether the mask is fixed."""
        return self._settled

    @property
    def settles_at(self) -> float:
        """The end of the ramp."""
        return self._config.ramp_fraction

    def metrics(self) -> dict[str, float]:
        """Sparsity over the chosen modules."""
        masks = self._masks
        kept = int(totals([piece(mask).sum() for mask in masks], masks).sum())
        return {"sparsity": 1 - kept / sum(mask.numel() for mask in masks)}

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position; the masks are in the model."""
        return {"calls": self._calls, "settled": self._settled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._calls, self._settled = state["calls"], state["settled"]
