"""What SMOL is made of: the grid's rounding, the scales, the average of precisions, and budgets."""

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_approx.methods.precision import assign, initial_limit, precision, steer
from hf_approx.methods.rounding import fit_scale, governed, reduce
from hf_approx.packing.grid import Grid, dequantize, expand, quantize, round_to_grid


def nearest(weight, bits, scale):
    return round_to_grid(weight, Grid(bits, scale))


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_has_the_levels_and_errors_of_the_paper(bits):
    """S2, on the clip range and beyond; the same bits as the packed grid."""
    weight = torch.linspace(-2, 2, 4001).reshape(1, -1)
    part = torch.full((1, 1), bits, dtype=torch.uint8)
    value = nearest(weight, part, torch.ones(1, 1))
    assert len(value[weight != 0].unique()) == 2**bits
    assert (value - weight).abs().max() <= 2.0 ** (1 - bits) + 1e-6
    torch.testing.assert_close(nearest(-weight, part, torch.ones(1, 1))[weight * 2**bits % 1 != 0],
                               -value[weight * 2**bits % 1 != 0])  # fmt: skip
    assert torch.equal(nearest(value, part, torch.ones(1, 1)), value)
    scale = torch.tensor([[0.0371]]).half().float()
    scaled = weight * 0.05
    grid = Grid(part, scale.half())
    packed = dequantize(quantize(scaled, grid), grid, scaled.dtype)
    # A weight of exactly zero, which the middle of the range is on some processors, has no code.
    assert torch.equal(round_to_grid(scaled, grid)[scaled != 0], packed[scaled != 0])


def test_precision_and_initial_limit_are_inverse():
    """S3, with the values of the specification."""
    for bits, limit in ((8, -4.844187), (4, -1.945910), (3, -1.098612), (2, 0.0)):
        assert initial_limit(bits) == pytest.approx(limit, abs=1e-6)
        assert float(precision(torch.tensor(initial_limit(bits)))) == pytest.approx(bits, abs=1e-5)


def test_rounding_displaces_no_weight_by_more_than_its_noise_where_precisions_round_up():
    """S4, and with precisions rounded to the nearest by no more than sqrt(2) times."""
    torch.manual_seed(0)
    weight = torch.randn(50, 40).clamp(-1, 1)
    limits = torch.empty(50, 40).uniform_(-4, 1)
    sigma, wanted = torch.sigmoid(limits), precision(limits)
    clipped = torch.minimum(torch.maximum(weight, -(2 - sigma)), 2 - sigma)
    for bits, most in ((wanted.ceil(), 1.0), (wanted.round(), 2**0.5)):
        value = nearest(clipped, bits.to(torch.uint8), torch.ones(1, 1))
        assert ((value - clipped).abs() <= most * sigma + 1e-6).all()


@settings(max_examples=60)
@given(
    st.integers(1, 400),
    st.sampled_from([(1, 2, 3, 4, 5, 6, 7, 8), (2, 4, 8), (1, 8), (3,)]),
    st.floats(0, 1),
    st.integers(0, 1000),
)
@example(29, (2, 4, 8), 0.875, 2)
def test_equal_parts_meet_any_budget_to_within_one_step(count, allowed, fraction, seed):
    target = allowed[0] + fraction * (allowed[-1] - allowed[0])
    wanted = torch.empty(count).uniform_(1, 8, generator=torch.Generator().manual_seed(seed))
    assigned = assign(wanted, torch.full((count,), 64.0), allowed, target)
    assert set(assigned.tolist()) <= set(allowed)
    step = max((b - a for a, b in pairwise(allowed)), default=0)
    assert abs(float(assigned.double().mean()) - target) <= max(step / count, 1e-9)
    # Of two parts that want nearly the same, one may go up a level and the other down to close the budget.
    level = torch.tensor([allowed.index(bits) for bits in assigned[wanted.argsort()].tolist()])
    assert (level.diff() >= -2).all()


@settings(max_examples=40)
@given(
    st.integers(150, 400),
    st.lists(st.integers(1000, 3000), max_size=5),
    st.sampled_from([(1, 2, 3, 4, 5, 6, 7, 8), (2, 4, 8)]),
    st.floats(0, 1),
    st.integers(0, 1000),
)
@example(185, [3000, 3000, 3000, 1000], (2, 4, 8), 0.9246244843183216, 1150)
@example(150, [1000, 3000, 3000], (2, 4, 8), 0.05937415472494567, 3982)
def test_unequal_parts_meet_any_budget_within_the_tolerance(small, large, allowed, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.cat([torch.tensor(large), torch.randint(1, 101, (small,), generator=generator)]).float()
    target = allowed[0] + fraction * (allowed[-1] - allowed[0])
    wanted = torch.empty(len(sizes)).uniform_(1, 8, generator=generator)
    assigned = assign(wanted, sizes, allowed, target).double()
    assert abs(float((assigned * sizes).sum() / sizes.sum()) - target) <= 0.02


def test_few_large_parts_meet_a_budget_that_only_a_trade_meets():
    """Two bits for one part and four for the other is the only way to 3.2 here."""
    sizes = torch.tensor([400.0, 600.0])
    assert assign(torch.tensor([3.4, 3.1]), sizes, (2, 3, 4), 3.2).tolist() == [2, 4]


def test_a_part_that_wants_more_bits_gets_more():
    wanted = torch.tensor([1.2, 7.0, 3.4, 5.6])
    assert assign(wanted, torch.ones(4), range(1, 9), 4.25).tolist() == [1, 7, 3, 6]
    assert assign(wanted, torch.ones(4), range(1, 9), None).tolist() == [1, 7, 3, 6]
    assert assign(wanted, torch.ones(4), (2, 4, 8), None).tolist() == [2, 8, 4, 4]


def test_parts_without_weights_do_not_count():
    assigned = assign(torch.tensor([2.0, 2.0, 8.0]), torch.tensor([5.0, 5.0, 0.0]), range(1, 9), 4.0)
    assert assigned[:2].tolist() == [4, 4]


def test_steering_moves_the_average_and_keeps_the_order():
    limits = [torch.randn(30, 4) - 4, torch.randn(7, 1) - 5]
    before = limits[0].clone()
    sizes = [torch.tensor([[3.0, 3.0, 3.0, 1.0]]), torch.tensor([[200.0]])]
    steer(limits, sizes, 4.0, 1, 8)
    total = sum(float((n * precision(s)).sum()) for s, n in zip(limits, sizes, strict=True))
    assert total / (30 * 10 + 1400) == pytest.approx(4.0, abs=1e-3)
    moved = limits[0] - before
    free = limits[0] > initial_limit(8)
    torch.testing.assert_close(moved[free], moved[free][:1].expand(int(free.sum())))


@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (5, 12), (5, 3), (1, 4)])
def test_sums_over_parts_are_the_transpose_of_expansion(shape):
    values, part = torch.randn(5, 12, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    left = (expand(part, values.shape) * values).sum()
    torch.testing.assert_close((part * reduce(values, list(shape))).sum(), left)
    sizes = governed(values.shape, list(shape)).expand(shape)
    torch.testing.assert_close(sizes, reduce(torch.ones(5, 12), list(shape)))


@pytest.mark.parametrize(("bits", "slack"), [(1, 0.001), (2, 0.001), (3, 0.01), (4, 0.01), (8, 0.2)])
def test_the_fitted_scale_is_as_good_as_any_of_a_dense_search(bits, slack):
    torch.manual_seed(0)
    weight = torch.randn(4, 300) * torch.tensor([[0.01], [0.1], [1.0], [3.0]])
    part = torch.full((1, 1), bits, dtype=torch.uint8)
    fitted = fit_scale(weight, part, [4, 1])
    error = ((nearest(weight, part, fitted) - weight) ** 2).sum(1)
    top = weight.abs().amax(1, keepdim=True)
    searched = torch.stack([
        ((nearest(weight, part, top * f) - weight) ** 2).sum(1) for f in torch.linspace(0.05, 1.1, 1000).tolist()
    ]).amin(0)  # fmt: skip
    assert (error <= (1 + slack) * searched).all()
