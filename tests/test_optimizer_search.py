"""Searches on closed-form valleys, and with the optimizers themselves on a quadratic."""

import math

import pytest
import torch

from hf_approx import AvaGrad
from hf_approx.optim import gradient_scale, grid_search, scaled_lr, separable_search

LRS = [10.0**k for k in range(-6, 4)]
EPSILONS = [10.0**k for k in range(-8, 3)]


class Counted:
    def __init__(self, score):
        self.score, self.calls = score, []

    def __call__(self, lr, eps):
        self.calls.append((lr, eps))
        return self.score(lr, eps)


def hill(lr, eps):
    """What AvaGrad promises: the best of each does not depend on the other."""
    return -((math.log10(lr) - 1) ** 2) - (math.log10(eps) + 3) ** 2


def valley(lr, eps):
    """What Adam has: the best rate is 1e-3 * (1 + eps / 1e-3), the best eps 1e-2."""
    return -((10 * math.log10(lr / (1e-3 * (1 + eps / 1e-3)))) ** 2) - (math.log10(eps) + 2) ** 2


def test_two_searches_find_the_top_of_a_separable_hill():
    grid, line = Counted(hill), Counted(hill)
    whole = grid_search(grid, LRS, EPSILONS)
    found = separable_search(line, LRS, EPSILONS, lr=0.1)
    assert whole.best == found.best == (10.0, 1e-3)
    assert whole.score == found.score == 0
    assert len(grid.calls) == whole.trainings == len(LRS) * len(EPSILONS)
    assert len(line.calls) == found.trainings == len(LRS) + len(EPSILONS) - 1
    assert len(set(line.calls)) == len(line.calls)
    assert set(whole.best_lrs().values()) == {10.0}


def test_a_diagonal_valley_needs_the_rate_to_follow_eps():
    fixed = separable_search(valley, LRS, EPSILONS, lr=1e-3)
    scaled = separable_search(valley, LRS, EPSILONS, lr=lambda eps: scaled_lr(1e-3, 1e-8, eps, gradient=1e-3))
    assert fixed.best[1] == 1e-4
    assert scaled.best == (pytest.approx(1.1e-2, rel=1e-4), 1e-2)
    assert scaled.score > fixed.score + 3


@pytest.mark.parametrize("new_eps", [1e-10, 1e-5, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("gradient", [2e-3, 0.5])
def test_the_scaled_rate_moves_a_weight_as_far_as_adam_did(gradient, new_eps):
    def moved(lr, eps):
        weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=lr, eps=eps)
        for _ in range(5):
            weight.grad = torch.tensor(gradient, dtype=torch.float64)
            optimizer.step()
        return weight.item()

    assert moved(scaled_lr(1e-2, 1e-3, new_eps, gradient), new_eps) == pytest.approx(moved(1e-2, 1e-3))


def test_without_a_gradient_the_rate_is_proportional_to_eps():
    assert scaled_lr(0.5, 0.1, 10.0) == pytest.approx(50.0)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, AvaGrad])
def test_gradient_scale_is_the_root_mean_square_of_steady_gradients(cls):
    first, second = torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
    unused = torch.zeros(100, requires_grad=True)
    optimizer = cls([first, second, unused], lr=1e-3)
    with pytest.raises(ValueError, match="let it take a step first"):
        gradient_scale(optimizer)
    for _ in range(4):
        first.grad, second.grad = torch.full((3,), -0.2), torch.full((1,), 1.0)
        optimizer.step()
    assert gradient_scale(optimizer) == pytest.approx(math.sqrt((3 * 0.04 + 1) / 4), rel=1e-5)


def test_a_plain_sgd_remembers_no_gradients():
    weight = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="SGD remembers no squares"):
        gradient_scale(torch.optim.SGD([weight], lr=0.1))


@pytest.mark.parametrize(("cls", "moves"), [(torch.optim.Adam, 1e4), (AvaGrad, 1.0)])
def test_the_best_rate_of_a_quadratic_moves_with_eps_for_adam_alone(cls, moves):
    curvature = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)

    def score(lr, eps):
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
        optimizer = cls([weights], lr=lr, eps=eps)
        for _ in range(30):
            optimizer.zero_grad()
            loss = (curvature * weights.square()).sum() / 2
            loss.backward()
            optimizer.step()
        return -math.log(float(loss))

    best = grid_search(score, [10.0**k for k in range(-3, 8)], [1e2, 1e4, 1e6]).best_lrs()
    assert best[1e6] / best[1e2] == pytest.approx(moves)


@pytest.mark.parametrize("diverged", [math.nan, math.inf, -math.inf])
def test_a_diverged_training_is_never_the_best(diverged):
    def score(lr, eps):
        return diverged if lr > 1 or eps == 1.0 else lr

    found = grid_search(score, [0.1, 1.0, 10.0], [1e-3, 1.0])
    assert found.best == (1.0, 1e-3)
    assert found.best_lrs() == {1e-3: 1.0}
    with pytest.raises(ValueError, match="Every training diverged"):
        separable_search(score, [0.1], [1e-3], lr=10.0)
    with pytest.raises(ValueError, match="Every training diverged"):
        _ = grid_search(score, [10.0], [1e-3]).best


@pytest.mark.parametrize(
    ("lrs", "epsilons", "lr", "message"),
    [
        ([], [1e-3], 0.1, "no lr to try"),
        ([0.1], [], 0.1, "no eps to try"),
        ([0.1, 0.0], [1e-3], 0.1, "lr must be a finite number > 0, got 0.0"),
        ([0.1], [math.inf], 0.1, "eps must be a finite number > 0, got inf"),
        ([0.1], [1e-3], -1.0, "lr must be a finite number > 0, got -1.0"),
        ([0.1], [1e-3], lambda eps: math.nan, "lr must be a finite number > 0, got nan"),
    ],
)
def test_nothing_is_trained_on_bad_input(lrs, epsilons, lr, message):
    score = Counted(hill)
    with pytest.raises(ValueError, match=message):
        separable_search(score, lrs, epsilons, lr)
    assert score.calls == []


def test_scaled_lr_refuses_what_is_no_rate():
    with pytest.raises(ValueError, match="lr must be a finite number > 0"):
        scaled_lr(0.0, 1e-8, 1e-3)
    with pytest.raises(ValueError, match="gradient must be a finite number >= 0"):
        scaled_lr(0.1, 1e-8, 1e-3, gradient=-1.0)
