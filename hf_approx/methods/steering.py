"""Keeping the sparsity of soft masks on its way to the target.

All scores that are ranked together are lowered by one number, so that the wanted share is below zero. The number is
what a penalty on the mask would have to reach: a force equal on all scores, whose multiplier is solved for instead of
tuned.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_approx.methods.budget import cubic_ramp, threshold
from hf_approx.methods.masks import SigmoidMask, in_fours
from hf_approx.methods.presets import Settings
from hf_approx.modules.sharded import piece, whole, write
from hf_approx.targets import Target

EASE = 0.25
"""Part of the soft phase in which scores that start equal come down to zero."""


def resting_level(settings: Settings, progress: float) -> float:
    """Where the scores at the edge of the wanted share are put: zero, in the end.

    Scores that start equal would all fall by s0 in the first step: they are let down slowly instead.
    """
    return settings.initial_score * max(1 - progress / EASE, 0.0) if settings.score_init == "constant" else 0.0


@torch.no_grad()
def lower(
    groups: Sequence[Sequence[Tensor]], targets: Sequence[float], fraction: float, level: float, stacked: bool
) -> Tensor | float:
    """Lower the scores of every group.

    Args:
        groups: Scores that are ranked together.
        targets: Of each group.
        fraction: Position on the cubic ramp to the targets.
        level: Of `resting_level`.
        stacked: Each tensor holds the scores of several weights, in its first dimension.

    Returns:
        What was taken off the scores of the last group, where they are, so that no device is waited for; NaN, and
        nothing is taken off, if a score is NaN.
    """
    force: Tensor | float = 0.0
    for scores, target in zip(groups, targets, strict=True):
        wanted = cubic_ramp(fraction, target)
        if wanted > 0:
            force = threshold(scores, wanted, stacked) - level
            move = force.nan_to_num(0.0)
            for each in scores:
                piece(each).sub_(move)
    return force


@torch.no_grad()
def lower_fours(targets: Sequence[Target], masks: Sequence[SigmoidMask], fraction: float, level: float) -> float:
    """As `lower`, with half of every four inputs as the wanted share; pulls harder as the ramp rises."""
    force = 0.0
    for target, mask in zip(targets, masks, strict=True):
        scores = whole(mask.scores.detach())
        fours = in_fours(target, scores)
        middle = fours.sort(dim=-1).values[..., 1:3].mean(-1, keepdim=True) - level
        force = float(torch.where(scores.isnan().any(), math.nan, middle.mean()))
        if math.isnan(force):
            return force
        fours.sub_(middle * cubic_ramp(fraction, 1.0))
        write(mask.scores, scores)
    return force


def best_two(target: Target, scores: Tensor) -> Tensor:
    """The mask of the best two of every four inputs."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    in_fours(target, keep).scatter_(-1, in_fours(target, scores).topk(2, dim=-1).indices, True)
    return keep
