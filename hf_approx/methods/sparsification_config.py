"""What can be chosen of Continuous Sparsification."""

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Literal

from hf_approx.methods.base import MethodConfig
from hf_approx.methods.budget import Scope, Sparsity, check_fraction, check_target
from hf_approx.methods.masks import GRANULARITIES, Granularity
from hf_approx.methods.presets import PRESETS, Settings
from hf_approx.structures import Kind

if TYPE_CHECKING:
    from hf_approx.methods.sparsification import ContinuousSparsification


@dataclass
class SparsificationConfig(MethodConfig):
    """Continuous Sparsification in one run: soft masks, hardening, fine-tuning with the fixed mask.

    Fields left at None take the preset's value.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    target_sparsity: Sparsity | None = field(
        default=0.9,
        metadata={
            "help": "Fraction removed, over all targets or by pattern: the scores are lowered together along a "
            "cubic ramp, and hardening keeps the top ones. None: plain CS, steered by the penalty and s0 alone."
        },
    )
    granularity: Granularity = field(
        default="weight",
        metadata={
            "help": "What has a score of its own: a 'weight' ('2:4': of every four inputs two stay), a 'row' or "
            "'column' of a weight, an attention 'head', a feed-forward 'neuron', or a whole 'layer' (a Transformer "
            "block). Heads, neurons and layers are removed at the end: the model is smaller and faster anywhere."
        },
    )
    scope: Scope | None = field(
        default=None,
        metadata={
            "help": "Rank over all layers or in each; for layers, over all lists of them or in each. Default: in each "
            "for heads, neurons and layers, else over all."
        },
    )
    preset: Literal["pretrained", "scratch", "paper"] = field(
        default="pretrained", metadata={"help": "Where the fields left at None come from."}
    )
    initial_score: float | None = field(default=None, metadata={"help": "s0, the (mean) score at the start."})
    score_init: Literal["constant", "magnitude"] | None = field(
        default=None,
        metadata={"help": "'constant': s0 everywhere. 'magnitude': s0 |w| / mean |w|, in each layer."},
    )
    scale_mask: bool | None = field(
        default=None, metadata={"help": "Multiply soft and hard mask by 1 / sigmoid(s0), folded at the end."}
    )
    initial_temperature: float | None = field(default=None, metadata={"help": "beta at the first step."})
    final_temperature: float = field(default=200.0, metadata={"help": "beta when the soft phase ends."})
    soft_fraction: float | None = field(
        default=None, metadata={"help": "Part of training with soft masks; the rest fine-tunes."}
    )
    mask_lr: float | None = field(default=None, metadata={"help": "Adam's learning rate for the scores."})
    penalty: float = field(default=1e-8, metadata={"help": "lambda, per unit of mask; without a target sparsity."})
    train_weights: bool = field(
        default=True,
        metadata={
            "help": "False: a pure supermask. The target weights keep the values they have (folded scale aside) and "
            "only their scores are trained; every other parameter is trained as usual."
        },
    )

    def __post_init__(self) -> None:
        where = "SparsificationConfig"
        if self.preset not in PRESETS:
            raise ValueError(f"{where}: preset must be one of {', '.join(PRESETS)}, got {self.preset!r}.")
        settings = self.settings()
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"{where}: granularity must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}."
            )
        if self.scope not in (None, "global", "layer"):
            raise ValueError(f"{where}: scope must be 'global' or 'layer', got {self.scope!r}.")
        if self.granularity == "2:4" and self.target_sparsity != 0.5:
            raise ValueError(f"{where}: granularity '2:4' removes half: set target_sparsity=0.5.")
        if self.granularity == "layer" and settings.scale_mask:
            raise ValueError(
                f"{where}: nothing is left of a removed layer to fold a scale into: set scale_mask=False for "
                "granularity 'layer'."
            )
        if self.granularity == "layer" and not self.train_weights:
            raise ValueError(f"{where}: granularity 'layer' masks no weight; leave train_weights at True.")
        if self.target_sparsity is not None:
            check_target(where, self.target_sparsity)
        check_fraction(where, "soft_fraction", settings.soft_fraction)
        if not 0 < settings.initial_temperature <= self.final_temperature < math.inf:
            raise ValueError(
                f"{where}: needs 0 < initial_temperature <= final_temperature, got "
                f"{settings.initial_temperature} and {self.final_temperature}."
            )
        for name, value in (("mask_lr", settings.mask_lr), ("penalty", self.penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{where}: {name} must be a finite number >= 0, got {value}.")
        if not math.isfinite(settings.initial_score):
            raise ValueError(f"{where}: initial_score must be finite, got {settings.initial_score}.")
        if settings.score_init not in ("constant", "magnitude"):
            raise ValueError(f"{where}: score_init must be 'constant' or 'magnitude', got {settings.score_init!r}.")
        if settings.score_init == "magnitude" and (settings.scale_mask or settings.initial_score <= 0):
            raise ValueError(
                f"{where}: score_init='magnitude' needs initial_score > 0 and scale_mask=False, since 1/sigmoid(s0) "
                "makes the mask one only where every score is s0."
            )

    def settings(self) -> Settings:
        """The preset's values, with the fields that were given in their place."""
        given = {field.name: getattr(self, field.name) for field in fields(Settings)}
        return replace(PRESETS[self.preset], **{name: value for name, value in given.items() if value is not None})

    def check_rounds(self) -> None:
        """Raise `ValueError` unless the masks are soft for a whole round and nothing is cut out of the model."""
        if self.structured:
            raise ValueError("SparsificationConfig: what is cut out cannot be rewound; use another granularity.")
        if self.settings().soft_fraction != 1.0:
            raise ValueError(
                "SparsificationConfig: in a ticket search the masks are soft for a whole round; set soft_fraction=1.0."
            )

    @property
    def structured(self) -> Kind | Literal["layer"] | None:
        """The kind of structure that is removed, if it is one."""
        return self.granularity if self.granularity in ("head", "neuron", "layer") else None

    def build(self) -> "ContinuousSparsification":
        """The method this config describes."""
        from hf_approx.methods.sparsification import ContinuousSparsification  # which imports this module

        return ContinuousSparsification(self)
