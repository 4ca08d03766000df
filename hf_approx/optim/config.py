"""Hyper-parameters of AvaGrad, validated when they are made."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from hf_approx.logs import get_logger

logger = get_logger(__name__)

Variant = Literal["exact", "reference", "paper"]
GammaScope = Literal["global", "group"]

NOT_AVAGRADS = (
    *("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim_args", "optim_target_modules"),
)
"""Of `TrainingArguments`: what its own optimizers read, and AvaGrad does not."""


def check_hyperparameters(lr: Any, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise `ValueError` unless every value is finite and in the range the update rule needs; `lr` may be a tensor."""
    if getattr(lr, "shape", ()) not in ((), (1,)):
        raise ValueError(f"AvaGrad: lr must be one number, got a tensor of shape {tuple(lr.shape)}.")
    if not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"AvaGrad: lr must be a finite number >= 0, got {lr}.")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"AvaGrad: eps must be a finite number > 0, got {eps}.")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"AvaGrad: betas must be two numbers in [0, 1), got {betas}.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"AvaGrad: weight_decay must be a finite number >= 0, got {weight_decay}.")


def resolve_gamma_scope(variant: str, scope: str | None) -> str:
    """The scope a variant uses: the authors' code normalises per group, the paper over the whole model."""
    if variant not in ("exact", "reference", "paper"):
        raise ValueError(f"AvaGrad: variant must be 'exact', 'reference' or 'paper', got {variant!r}.")
    if scope not in (None, "global", "group"):
        raise ValueError(f"AvaGrad: gamma_scope must be 'global' or 'group', got {scope!r}.")
    if variant == "reference":
        if scope == "global":
            raise ValueError("AvaGrad: variant='reference' has one gamma per group; use 'exact' for a global one.")
        return "group"
    return scope or "global"


@dataclass(frozen=True)
class AvaGradConfig:
    """What `ApproxTrainer(optimizer=...)` needs to build [`AvaGrad`].

    The learning rate and the weight decay of `TrainingArguments` are Adam's, and are not used then.

    Raises:
        ValueError: If a value is not finite or out of range.
    """

    lr: float = field(default=0.1, metadata={"help": "Step size; the scheduler multiplies it."})
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata={"help": "Decay of the gradient mean and of its square."}
    )
    eps: float = field(
        default=0.1,
        metadata={"help": "Adaptability: small is Adam-like, large is SGD-like. Independent of lr."},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Decay of weights that are neither norms nor biases."})
    decoupled_weight_decay: bool = field(
        default=False, metadata={"help": "Shrink weights directly (AvaGradW), not by L2."}
    )
    variant: Variant = field(default="exact", metadata={"help": "'exact', 'reference' or 'paper'."})
    gamma_scope: GammaScope | None = field(
        default=None, metadata={"help": "One gamma for the whole model or per group."}
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_hyperparameters(self.lr, self.betas, self.eps, self.weight_decay)
        resolve_gamma_scope(self.variant, self.gamma_scope)

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of [`AvaGrad`]."""
        return asdict(self)


def check_config(optimizer: Any, where: str) -> None:
    """Raise `ValueError`, beginning with `where`, unless an argument `optimizer` is [`AvaGradConfig`] or None."""
    if optimizer is not None and not isinstance(optimizer, AvaGradConfig):
        raise ValueError(
            f"{where}: optimizer takes AvaGradConfig(...), or None for the one TrainingArguments(optim=...) names, "
            f"got {optimizer!r}."
        )


def check_arguments(args: Any, config: AvaGradConfig, where: str) -> None:
    """Warn of `TrainingArguments` that AvaGrad does not use; raise `ValueError` if they name another optimizer."""
    changed = {name: getattr(args, name) for name in NOT_AVAGRADS if getattr(args, name) != getattr(type(args), name)}
    if "optim" in changed:
        raise ValueError(
            f"{where}: optimizer=AvaGradConfig(...) and optim={str(getattr(args.optim, 'value', args.optim))!r} name "
            "two optimizers; leave one of them out."
        )
    if "learning_rate" in changed:
        rate = changed.pop("learning_rate")
        logger.warning(
            "AvaGrad trains with the lr of its own config, %g, and not with learning_rate=%g.", config.lr, rate
        )
    if changed:
        unused = ", ".join(f"{name}={value!r}" for name, value in changed.items())
        logger.warning("AvaGrad trains with the settings of its own config, and not with %s.", unused)
