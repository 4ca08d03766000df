"""Layers dropped before training: a baseline for the methods that learn which to remove or to share.

Sajjad et al., "On the Effect of Dropping Layers of Pre-trained Transformer Models", 2023.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from hf_approx.blocks import Blocks
from hf_approx.methods.base import Method, MethodConfig
from hf_approx.methods.budget import check_fraction
from hf_approx.methods.layers import BlockMask
from hf_approx.methods.sparsification import ContinuousSparsification
from hf_approx.methods.sparsification_config import SparsificationConfig


@dataclass
class LayerDroppingConfig(MethodConfig):
    """Train without some of the Transformer blocks from the first step on.

    Raises:
        ValueError: A value is out of range.
    """

    target_sparsity: float = field(default=0.5, metadata={"help": "Fraction of the layers of each list that goes."})
    order: Literal["last", "alternate"] = field(
        default="last", metadata={"help": "'last': those next to the output. 'alternate': every second one first."}
    )

    def __post_init__(self) -> None:
        where = "LayerDroppingConfig"
        check_fraction(where, "target_sparsity", self.target_sparsity)
        if self.order not in ("last", "alternate"):
            raise ValueError(f"{where}: order must be 'last' or 'alternate', got {self.order!r}.")

    def build(self) -> "LayerDropping":
        """The method this config describes."""
        return LayerDropping(self)


class LayerDropping(ContinuousSparsification):
    """See [`LayerDroppingConfig`]. A mask on layers that is hard from the first step."""

    name = "layer_dropping"

    def __init__(self, config: LayerDroppingConfig) -> None:
        super().__init__(
            SparsificationConfig(
                target_modules=config.target_modules,
                exclude=config.exclude,
                target_parameters=config.target_parameters,
                granularity="layer",
                target_sparsity=config.target_sparsity,
                score_init="constant",
                soft_fraction=0.0,
            )
        )
        self._own_config = config

    @property
    def config(self) -> MethodConfig:  # type: ignore[override]
        """The config that built this object."""
        return self._own_config

    def attach(self, model: nn.Module, earlier: Sequence[Method] = ()) -> None:
        """Mask the layers. The model is unchanged if this raises."""
        super().attach(model, earlier)
        self.settle()

    def block_mask(self, blocks: Blocks) -> BlockMask:
        """Scores in the order in which layers stay."""
        mask = super().block_mask(blocks)
        count = mask.scores.numel()
        order = list(range(count))
        if self._own_config.order == "alternate":
            order = [*order[::2], *order[1::2]]
        scores = torch.empty(count)
        scores[order] = torch.arange(count, 0, -1, dtype=scores.dtype)
        mask.scores = nn.Parameter(scores.to(mask.scores), requires_grad=False)
        return mask

    def param_groups(self) -> list[dict[str, Any]]:
        """None: nothing is learned about layers."""
        return []
