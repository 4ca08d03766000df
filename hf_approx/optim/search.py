"""Choosing a learning rate and an eps: the full grid, two one-dimensional searches, Adam's rate for another eps."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.optim import Optimizer

K = TypeVar("K")

Score = Callable[[float, float], float]
"""`score(lr, eps)` trains and returns a number that is higher for better models.

NaN or an infinite number stands for a training that diverged.
"""


@dataclass(frozen=True)
class SearchResult:
    """What a search tried.

    Attributes:
        scores: By learning rate and eps, in the order they were tried.
    """

    scores: dict[tuple[float, float], float]

    @property
    def best(self) -> tuple[float, float]:
        """Learning rate and eps of the highest score; of equals, the first tried.

        Raises:
            ValueError: Every training diverged.
        """
        lr, eps = _best(self.scores)
        return lr, eps

    @property
    def score(self) -> float:
        """The highest score."""
        return self.scores[self.best]

    @property
    def trainings(self) -> int:
        """How many pairs were tried."""
        return len(self.scores)

    def best_lrs(self) -> dict[float, float]:
        """The best learning rate of each eps at which some training did not diverge."""
        found = {}
        for eps in dict.fromkeys(eps for _, eps in self.scores):
            line = {lr: score for (lr, other), score in self.scores.items() if other == eps and math.isfinite(score)}
            if line:
                found[eps] = _best(line)
        return found


def _best(scores: dict[K, float]) -> K:
    finite = {key: score for key, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise ValueError("Every training diverged: search among smaller learning rates.")
    return max(finite, key=finite.__getitem__)


def grid_search(score: Score, lrs: Sequence[float], epsilons: Sequence[float]) -> SearchResult:
    """Try every learning rate with every eps.

    Args:
        score: See `Score`; called once for each pair.
        lrs: Learning rates, at least one, positive.
        epsilons: As `lrs`.

    Raises:
        ValueError: There is nothing to try, or a value is not finite and positive.
    """
    _check(lr=lrs, eps=epsilons)
    return SearchResult({(lr, eps): score(lr, eps) for eps in epsilons for lr in lrs})


def separable_search(
    score: Score, lrs: Sequence[float], epsilons: Sequence[float], lr: float | Callable[[float], float] = 0.1
) -> SearchResult:
    """Try every eps at one learning rate, then every learning rate at the best eps (AvaGrad, section 1).

    It finds what the grid finds if the best eps is the same at every learning rate, as it nearly is for AvaGrad. Adam
    needs a learning rate that goes with eps: `lr=lambda eps: scaled_lr(1e-3, 1e-8, eps, gradient)`.

    Args:
        score: See `Score`; called once for each pair.
        lrs: Learning rates to try at the best eps, at least one, positive.
        epsilons: As `lrs`, to try at `lr`.
        lr: The learning rate while eps is searched, or a function from eps to it. Default 0.1, which is AvaGrad's.

    Raises:
        ValueError: There is nothing to try, a value is not finite and positive, or every eps diverges.
    """
    _check(lr=lrs, eps=epsilons)
    first = [(lr(eps) if callable(lr) else lr, eps) for eps in epsilons]
    _check(lr=[rate for rate, _ in first])
    scores = {pair: score(*pair) for pair in first}
    _, eps = _best(scores)
    for rate in lrs:
        if (rate, eps) not in scores:
            scores[rate, eps] = score(rate, eps)
    return SearchResult(scores)


def scaled_lr(lr: float, eps: float, new_eps: float, gradient: float = 0.0) -> float:
    """The learning rate with which Adam's steps are as long at another eps.

    A weight whose second moment has the root g moves by `lr * m / (g + eps)`. So the rate that goes with `new_eps` is
    `lr * (g + new_eps) / (g + eps)`: the same where both are far below the gradients, proportional to eps where both
    are far above. AvaGrad needs no such thing.

    Args:
        lr: A rate that suits `eps`.
        eps: Adam's eps, outside of the root, as in PyTorch.
        new_eps: Another.
        gradient: The typical size g of a weight's gradient, as `gradient_scale` measures it. Default 0: both are
            taken to be far above the gradients.

    Raises:
        ValueError: A value is not finite and positive; `gradient` may be 0.
    """
    _check(lr=[lr], eps=[eps, new_eps])
    if not (math.isfinite(gradient) and gradient >= 0):
        raise ValueError(f"gradient must be a finite number >= 0, got {gradient}.")
    return lr * (gradient + new_eps) / (gradient + eps)


def gradient_scale(optimizer: Optimizer) -> float:
    """Root mean square of the gradients that an optimizer of Adam's kind remembers, over all its weights.

    Args:
        optimizer: Adam, AdamW or AvaGrad after some steps; one whose state holds `exp_avg_sq` and `step`.

    Raises:
        ValueError: It has taken no step, or remembers no squares.
    """
    total, count, states = 0.0, 0, optimizer.state
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = states.get(param, {})
            if "exp_avg_sq" not in state:
                continue
            square: torch.Tensor = state["exp_avg_sq"].double()
            total += float(square.sum()) / (1 - group["betas"][1] ** float(state["step"]))
            count += square.numel()
    if not count:
        raise ValueError(f"{type(optimizer).__name__} remembers no squares of gradients: let it take a step first.")
    return math.sqrt(total / count)


def _check(**values: Iterable[float]) -> None:
    for name, numbers in values.items():
        numbers = list(numbers)
        if not numbers:
            raise ValueError(f"There is no {name} to try.")
        for number in numbers:
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {number}.")
