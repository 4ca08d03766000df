"""Settings of Continuous Sparsification for pretrained and for random weights, and the paper's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What a preset decides; `SparsificationConfig` says what each means."""

    initial_score: float
    score_init: str
    scale_mask: bool
    initial_temperature: float
    soft_fraction: float
    mask_lr: float


PRESETS = {
    # Starts close to the pretrained function: no rescaling, masks near one for all but the smallest weights.
    "pretrained": Settings(
        initial_score=0.5,
        score_init="magnitude",
        scale_mask=False,
        initial_temperature=5.0,
        soft_fraction=0.75,
        mask_lr=2e-3,
    ),
    # For random weights, whose sizes mean nothing: equal scores, masks that start at one.
    "scratch": Settings(
        initial_score=0.1,
        score_init="constant",
        scale_mask=True,
        initial_temperature=1.0,
        soft_fraction=0.75,
        mask_lr=1e-2,
    ),
    # The authors' settings: masks start at exactly one through the scale 1 / sigmoid(s0).
    "paper": Settings(
        initial_score=0.0,
        score_init="constant",
        scale_mask=True,
        initial_temperature=1.0,
        soft_fraction=0.5,
        mask_lr=1e-2,
    ),
}
