"""How many entries each group of modules may keep: one target over all, one in each, or one for a pattern."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_approx.finite import NotFiniteError
from hf_approx.modules.sharded import by_piece, every, piece, totals
from hf_approx.targets import matches

Sparsity = float | dict[str, float]
"""A sparsity for all targets together, or one for each pattern (a name or its ending; the first match counts)."""

Scope = Literal["global", "layer"]


def check_fraction(where: str, name: str, value: float, low: float = 0.0, high: float = 1.0) -> None:
    """Raise `ValueError` unless low <= value <= high (NaN fails)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{where}: {name} must be between {low:g} and {high:g}, got {value!r}.")


def check_target(where: str, target: Sparsity) -> None:
    """Raise `ValueError` unless every sparsity is a fraction."""
    if not isinstance(target, Mapping):
        check_fraction(where, "target_sparsity", target)
        return
    if not target:
        raise ValueError(f"{where}: target_sparsity has no pattern; give a number or at least one pattern.")
    for pattern, value in target.items():
        check_fraction(where, f"target_sparsity[{pattern!r}]", value)


@dataclass(frozen=True)
class Group:
    """Modules that share a target, and that target."""

    members: tuple[int, ...]
    target: float


def plan(names: Sequence[str], target: Sparsity, scope: Scope, field: str = "target_sparsity") -> list[Group]:
    """The groups of a method's modules, by their positions in `names`.

    Args:
        names: Of the modules.
        target: For all, or by pattern.
        scope: Whether the modules of a target share a group.
        field: What the target is called, for the error.

    Raises:
        ValueError: A module matches no pattern.
    """
    if not isinstance(target, Mapping):
        everything = tuple(range(len(names)))
        return [Group(everything, target)] if scope == "global" else [Group((i,), target) for i in everything]
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        pattern = next((p for p in target if matches(name, [p])), None)
        if pattern is None:
            raise ValueError(f"{field} has no pattern for '{name}'; add one, or add it to exclude.")
        found.setdefault(pattern, []).append(i)
    groups = [Group(tuple(members), target[pattern]) for pattern, members in found.items()]
    if scope == "global":
        return groups
    return [Group((i,), group.target) for group in groups for i in group.members]


def top_masks(scores: Sequence[Tensor], groups: Sequence[Group], fraction: float = 1.0) -> list[Tensor]:
    """Masks of the best entries, in the order of the scores; of scores split over processes, of the pieces here.

    Args:
        scores: One tensor a module.
        groups: What is ranked together; together they hold every module once.
        fraction: Position on the cubic ramp to the targets; 1 is the end.
    """
    masks: dict[int, Tensor] = {}
    for group in groups:
        tensors = [scores[i] for i in group.members]
        keep = round((1 - cubic_ramp(fraction, group.target)) * sum(t.numel() for t in tensors))
        masks.update(zip(group.members, global_top_k(tensors, keep), strict=True))
    return [masks[i] for i in range(len(scores))]


QUANTILE_SAMPLE = 1 << 18
"""Scores that place a threshold during training; the final mask ranks all of them."""


def threshold(scores: Sequence[Tensor], sparsity: float, stacked: bool = False) -> Tensor:
    """The value that about the given share of the entries is not above, from an evenly spaced sample.

    NaN if one of the sample is: it is above or below no other.

    Args:
        scores: Any.
        sparsity: The share.
        stacked: Each tensor holds those of several weights, in its first dimension.
    """
    # Odd, so that it does not fall into step with the width of the matrices and see only some columns.
    stride = (sum(s.numel() for s in scores) // QUANTILE_SAMPLE) | 1
    sample = torch.cat([every(s.detach(), stride, stacked) for s in scores])
    value = sample.kthvalue(max(round(sparsity * sample.numel()), 1)).values
    return torch.where(sample.isnan().any(), torch.nan, value)


def global_top_k(tensors: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Masks of the `keep` largest entries over all tensors together; ties go to the earliest entries.

    The smallest entry kept is found by bisection, which only counts: the tensors may be split over processes, and the
    masks are those of the pieces here.

    Raises:
        NotFiniteError: One is NaN, which is larger and smaller than no other.
    """
    pieces = [piece(t.detach()) for t in tensors]
    if int(totals([p.isnan().sum() for p in pieces], tensors).sum()):
        raise NotFiniteError("Numbers that are to be ranked are NaN: training diverged.")
    keys = [_ordered(p) for p in pieces]
    if keep <= 0:
        return [torch.zeros_like(key, dtype=torch.bool) for key in keys]
    low, high = -(1 << 31), (1 << 31) - 1
    while low < high:
        middle = (low + high + 1) // 2
        enough = int(totals([(key >= middle).sum() for key in keys], tensors).sum()) >= keep
        low, high = (middle, high) if enough else (low, middle - 1)
    masks = [key > low for key in keys]
    left = keep - int(totals([mask.sum() for mask in masks], tensors).sum())
    for tensor, key, mask in zip(tensors, keys, masks, strict=True):
        equal = (key == low).reshape(-1).nonzero().reshape(-1)
        counts, here = by_piece(torch.tensor(len(equal), device=key.device), tensor)
        share = max(left - int(counts[:here].sum()), 0)
        mask.view(-1)[equal[:share]] = True
        left = max(left - int(counts.sum()), 0)
    return masks


def _ordered(values: Tensor) -> Tensor:
    """Whole numbers in the order of float32 numbers."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32)  # minus zero becomes zero
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def cubic_ramp(fraction: float, final: float) -> float:
    """Sparsity at `fraction` of the ramp: final * (1 - (1 - x)^3) (Zhu and Gupta, 2017, equation 1)."""
    return final * (1 - (1 - min(max(fraction, 0.0), 1.0)) ** 3)
