"""What can be chosen of SMOL."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hf_approx.methods.base import MethodConfig
from hf_approx.methods.budget import Sparsity, check_fraction
from hf_approx.methods.noise import NoiseLaw
from hf_approx.methods.rounding import PartGranularity
from hf_approx.packing.grid import MAX_BITS
from hf_approx.targets import Patterns

if TYPE_CHECKING:
    from hf_approx.methods.smol import Smol


@dataclass
class SmolConfig(MethodConfig):
    """Mixed precision: noise teaches how many bits each part of the weights needs, then they are rounded.

    Raises:
        ValueError: A value is out of range or two contradict each other.
    """

    target_bits: Sparsity | None = field(
        default=4.0,
        metadata={
            "help": "Average bits a weight that is not zero, over all targets or by pattern: the limits are shifted "
            "together along a ramp, and the assigned precisions meet it within 0.02. None: the penalty decides."
        },
    )
    bits: Sequence[int] = field(default=tuple(range(1, MAX_BITS + 1)), metadata={"help": "Allowed precisions."})
    granularity: PartGranularity = field(
        default="group",
        metadata={
            "help": "What has a precision of its own: each 'weight' (the paper; the map of precisions then takes "
            "space too), 'group' of inputs of an output channel, output 'channel', or 'tensor'."
        },
    )
    group_size: int = field(default=128, metadata={"help": "Inputs in a group, at most."})
    scale_granularity: Literal["group", "channel", "tensor"] = field(
        default="channel", metadata={"help": "What has a scale of its own, stored in float16."}
    )
    train_scale: bool = field(default=True, metadata={"help": "Train the scales too, or only fit them twice."})
    train_weights: bool = field(
        default=True,
        metadata={
            "help": "False: the target weights keep the values they have until they are rounded, and only limits and "
            "scales are trained; every other parameter is trained as usual."
        },
    )
    noise: NoiseLaw = field(
        default="uniform", metadata={"help": "'uniform' in [-1, 1], or 'rademacher': the worst case, -1 or 1."}
    )
    initial_bits: float = field(default=8.0, metadata={"help": "Precision at the first step."})
    limit_init: Literal["curvature", "constant"] = field(
        default="curvature",
        metadata={
            "help": "With target bits. 'curvature': a quarter into the noise the limits are moved apart to where the "
            "squared gradients seen so far say they would come to rest, for training too short for the limits to get "
            "there. 'constant': they only learn, as in the paper."
        },
    )
    lr: float = field(default=1e-2, metadata={"help": "Adam's learning rate for the limits; the paper's is 1e-3."})
    scale_lr: float = field(default=1e-3, metadata={"help": "Adam's, for the logarithms of the scales."})
    penalty: float = field(default=1e-7, metadata={"help": "lambda, per bit of each weight; without target bits."})
    noise_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Part of training with noise; the rest trains rounded weights. Default: 0.5, or as long as an "
            "earlier method's mask on the same model is not fixed."
        },
    )
    activations: bool = field(default=False, metadata={"help": "Quantize the inputs of the target modules too."})
    activation_bits: float | None = field(
        default=8.0, metadata={"help": "Average bits of an input channel. None: the penalty decides."}
    )
    activation_granularity: Literal["tensor", "channel"] = field(
        default="tensor", metadata={"help": "What has a limit and a precision of its own."}
    )
    unsigned_activations: Patterns = field(
        default=None, metadata={"help": "Modules whose inputs are never negative, in the notation of targets."}
    )
    seed: int = field(default=0, metadata={"help": "Of the noise."})

    def __post_init__(self) -> None:
        where = "SmolConfig"
        self.bits = tuple(self.bits) if isinstance(self.bits, Sequence) else (self.bits,)
        whole = all(isinstance(b, int) and not isinstance(b, bool) and 1 <= b <= MAX_BITS for b in self.bits)
        if not (self.bits and whole and list(self.bits) == sorted(set(self.bits))):
            raise ValueError(f"{where}: bits must be rising whole numbers from 1 to {MAX_BITS}, got {self.bits}.")
        low, high = self.bits[0], self.bits[-1]
        targets: dict[str, float | None] = {}
        if isinstance(self.target_bits, Mapping):
            targets.update({f"target_bits[{pattern!r}]": value for pattern, value in self.target_bits.items()})
            if not self.target_bits:
                raise ValueError(f"{where}: target_bits has no pattern; give a number or at least one pattern.")
        else:
            targets["target_bits"] = self.target_bits
        for name, target in targets.items():
            if target is not None:
                check_fraction(where, name, target, low, high)
        if self.activation_bits is not None:
            check_fraction(where, "activation_bits", self.activation_bits, 1, MAX_BITS)
        check_fraction(where, "initial_bits", self.initial_bits, 1, MAX_BITS)
        if self.noise_fraction is not None:
            check_fraction(where, "noise_fraction", self.noise_fraction)
        choices = {
            "granularity": ("weight", "group", "channel", "tensor"),
            "scale_granularity": ("group", "channel", "tensor"),
            "limit_init": ("curvature", "constant"),
            "noise": ("uniform", "rademacher"),
            "activation_granularity": ("tensor", "channel"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{where}: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        for name in ("lr", "scale_lr", "penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{where}: {name} must be a finite number >= 0, got {getattr(self, name)}.")
        for name, least in (("group_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{where}: {name} must be a whole number >= {least}, got {value!r}.")

    def build(self) -> "Smol":
        """The method this config describes."""
        from hf_approx.methods.smol import Smol  # which imports this module

        return Smol(self)
