"""AvaGrad against its published trajectories (A1) and its invariants (A2 to A6)."""

import copy

import pytest
import torch

from hf_approx.optim import AvaGrad, AvaGradConfig, CompositeOptimizer

CURVATURE = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
START = (1.0, -2.0, 0.5)

TRAJECTORIES = {
    ("reference", 0.0, False): {
        1: (1.0, -2.0, 0.5),
        2: (0.9909090909, -1.9900497512, 0.4966666667),
        3: (0.9699596601, -1.9670850845, 0.4889783141),
        4: (0.9482256930, -1.9432020874, 0.4810014134),
        5: (0.9261954902, -1.9189414090, 0.4729300081),
        6: (0.9040616681, -1.8945116577, 0.4648403970),
    },
    ("reference", 0.05, True): {
        2: (0.9859090909, -1.9800497512, 0.4941666667),
        6: (0.8804395781, -1.8462221363, 0.4529301884),
    },
    ("reference", 0.05, False): {
        2: (0.9908695652, -1.9900495050, 0.4957142857),
        6: (0.8913515597, -1.8809820339, 0.4491495391),
    },
    ("exact", 0.0, False): {
        1: (1.0, -2.0, 0.5),
        2: (0.9765983462, -1.9743862496, 0.4914193936),
        6: (0.8846610815, -1.8730183520, 0.4577636901),
    },
    ("paper", 0.0, False): {
        1: (0.99, -1.8, 0.4995),
        6: (0.8350118630, -1.3998011305, 0.4874530799),
    },
}
REFERENCE_GAMMAS = (0.1, 0.2312193822, 0.2410959958, 0.2453541336, 0.2474819086, 0.2486070558)


def start():
    return torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))


def descend(optimizer, params, steps, curvature=CURVATURE):
    """Yield the weights after each step on f(w) = w' diag(curvature) w / 2."""
    for _ in range(steps):
        weights = torch.cat([p.reshape(-1) for p in params])
        optimizer.zero_grad()
        (0.5 * (curvature * weights * weights).sum()).backward()
        optimizer.step()
        yield torch.cat([p.detach().reshape(-1) for p in params]).clone()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("case", TRAJECTORIES, ids=str)
def test_a1_trajectories(case, foreach):
    variant, decay, decoupled = case
    w = start()
    optimizer = AvaGrad([w], variant=variant, weight_decay=decay, decoupled_weight_decay=decoupled, foreach=foreach)
    for t, value in enumerate(descend(optimizer, [w], 6), start=1):
        if t in TRAJECTORIES[case]:
            expected = torch.tensor(TRAJECTORIES[case][t], dtype=torch.float64)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-9)
        if case == ("reference", 0.0, False):
            assert optimizer.param_groups[0]["gamma"] == pytest.approx(REFERENCE_GAMMAS[t - 1], abs=1e-9)


def test_exact_rates_have_root_mean_square_one():
    """With m forced to 1 the step is lr * gamma * eta, so its RMS is lr."""
    w = start()
    optimizer = AvaGrad([w], lr=0.1, betas=(0.0, 0.999), eps=1e-3)
    for gradient in ((0.3, 5.0, 1e-4), (1.0, 1.0, 1.0)):
        before = w.detach().clone()
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    assert (w.detach() - before).square().mean().sqrt().item() == pytest.approx(0.1, abs=1e-12)


@pytest.mark.parametrize("variant", ["exact", "reference", "paper"])
def test_a2_scale_law(variant):
    c = 7.0
    w1, w2 = start(), start()
    plain = descend(AvaGrad([w1], lr=0.1, eps=0.1, variant=variant), [w1], 6)
    scaled = descend(AvaGrad([w2], lr=0.1 / c, eps=0.1 * c, variant=variant), [w2], 6, CURVATURE * c)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a3_large_eps_is_momentum_sgd_and_adam_is_not():
    w_sgd, m = torch.tensor(START, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    for t in range(1, 7):
        m = 0.9 * m + 0.1 * CURVATURE * w_sgd
        if t > 1:
            w_sgd = w_sgd - 0.1 * m / (1 - 0.9**t)

    def distance(eps, variant):
        w = start()
        return (list(descend(AvaGrad([w], eps=eps, variant=variant), [w], 6))[-1] - w_sgd).abs().max().item()

    assert distance(1e6, "reference") == pytest.approx(2.2e-5, rel=0.05)
    assert distance(1e8, "reference") == pytest.approx(2.2e-7, rel=0.05)
    assert distance(1e6, "exact") < 2.2e-5
    assert distance(1e8, "exact") == pytest.approx(distance(1e6, "exact") / 100, rel=0.05)
    w = start()
    moved = list(descend(torch.optim.Adam([w], lr=0.1, eps=1e6), [w], 6))[-1] - torch.tensor(START).double()
    assert moved.abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["exact", "paper"])
def test_a4_rates_do_not_see_the_current_gradient(variant):
    """Perturb only what enters v at t: with beta1 = 0 the step is linear in the gradient."""
    steps = []
    for scale in (1.0, 3.0):
        w = start()
        optimizer = AvaGrad([w], betas=(0.0, 0.999), variant=variant)
        list(descend(optimizer, [w], 3))
        before = w.detach().clone()
        w.grad = torch.ones(3, dtype=torch.float64) * scale
        optimizer.step()
        steps.append((w.detach() - before) / scale)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["exact", "reference", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a5_save_and_load_in_mid_run_is_bit_exact(variant, dtype, tmp_path):
    def gradient(t):
        return torch.randn(5, 7, generator=torch.Generator().manual_seed(t)).to(dtype)

    def run(w, optimizer, steps):
        for t in steps:
            w.grad = gradient(t)
            optimizer.step()

    w = torch.nn.Parameter(torch.ones(5, 7, dtype=dtype))
    optimizer = AvaGrad([w], variant=variant, weight_decay=0.01)
    run(w, optimizer, range(5))
    torch.save({"w": w.detach().clone(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(w, optimizer, range(5, 9))

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = torch.nn.Parameter(saved["w"])
    other = AvaGrad([resumed], variant=variant)
    other.load_state_dict(saved["optimizer"])
    run(resumed, other, range(5, 9))
    assert torch.equal(w, resumed)
    assert other.state[resumed]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize("split_groups", [False, True])
def test_a6_splitting_a_tensor_or_its_group_changes_nothing(split_groups):
    whole = start()
    expected = list(descend(AvaGrad([whole]), [whole], 6))[-1]
    parts = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (START[:2], START[2:])]
    params = [{"params": [p]} for p in reversed(parts)] if split_groups else list(reversed(parts))
    torch.testing.assert_close(list(descend(AvaGrad(params), parts, 6))[-1], expected, rtol=0, atol=1e-12)


def test_gamma_per_group_differs_from_global():
    def run(scope):
        parts = [torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (START[:2], START[2:])]
        optimizer = AvaGrad([{"params": [p]} for p in parts], gamma_scope=scope)
        return list(descend(optimizer, parts, 3))[-1]

    assert not torch.allclose(run("global"), run("group"))


def model_and_data():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    return model, torch.randn(32, 6), torch.randn(32, 2)


def train(model, optimizer, x, y, steps=10, scheduler=None, clip=None):
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize("variant", ["exact", "reference", "paper"])
def test_foreach_equals_single_tensor(variant):
    model, x, y = model_and_data()
    results = []
    for foreach in (True, False):
        copied = copy.deepcopy(model)
        groups = [
            {"params": list(copied[0].parameters()), "lr": 0.05, "eps": 1e-3},
            {"params": list(copied[2].parameters()), "weight_decay": 0.1},
        ]
        results.append(train(copied, AvaGrad(groups, variant=variant, foreach=foreach), x, y, clip=1.0))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("variant", ["exact", "reference", "paper"])
def test_a_deep_copy_goes_on_alike(variant):
    model, x, y = model_and_data()
    optimizer = CompositeOptimizer(
        AvaGrad(model[0].parameters(), variant=variant), torch.optim.Adam(model[2].parameters(), lr=1e-2)
    )
    train(model, optimizer, x, y, steps=3)
    copied, other = copy.deepcopy((model, optimizer))
    assert torch.equal(train(model, optimizer, x, y, steps=3), train(copied, other, x, y, steps=3))


def test_loading_another_variant_is_refused():
    saved = AvaGrad([start()]).state_dict()
    with pytest.raises(ValueError, match="saved with variant 'exact', this optimizer has 'paper'"):
        AvaGrad([start()], variant="paper").load_state_dict(saved)


def test_a_group_added_to_a_composite_is_stepped():
    w, late = start(), start()
    optimizer = CompositeOptimizer(torch.optim.SGD([w], lr=0.1))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.tensor(START, dtype=torch.float64) - 0.1)


def test_schedulers_scale_the_step():
    model, x, y = model_and_data()
    optimizer = AvaGrad(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 3 else 1.0)
    frozen = train(model, optimizer, x, y, steps=3, scheduler=scheduler)
    assert torch.equal(train(model, optimizer, x, y, steps=3, scheduler=scheduler), frozen)


def test_parameters_without_gradient_stay_out_of_gamma():
    w, idle = start(), torch.nn.Parameter(torch.ones(1000, dtype=torch.float64))
    last = list(descend(AvaGrad([w, idle]), [w], 6))[-1]
    torch.testing.assert_close(last, torch.tensor(TRAJECTORIES["exact", 0.0, False][6]).double(), rtol=0, atol=1e-7)
    assert torch.equal(idle.detach(), torch.ones(1000, dtype=torch.float64))


def test_a_parameter_may_join_late():
    w, late = start(), start()
    optimizer = AvaGrad([w, late], variant="exact")
    list(descend(optimizer, [w], 3))
    late.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(late.detach(), torch.tensor(START, dtype=torch.float64))
    optimizer.step()
    assert (late.detach() < torch.tensor(START)).all()


def test_maximize_mirrors_minimize():
    w1, w2 = start(), start()
    up, down = AvaGrad([w1], maximize=True), AvaGrad([w2])
    for _ in range(4):
        w1.grad, w2.grad = torch.ones(3, dtype=torch.float64), -torch.ones(3, dtype=torch.float64)
        up.step()
        down.step()
    assert torch.equal(w1, w2)


def test_closure_returns_its_loss():
    w = start()
    optimizer = AvaGrad([w])

    def closure():
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(5.25)


def test_grad_scaler_skips_an_overflow_and_unscales_the_rest():
    w, plain = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer, expected = AvaGrad([w]), AvaGrad([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 2.0, 3.0):
        optimizer.zero_grad()
        scaler.scale((w * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != float("inf"):
            plain.grad = torch.full((3,), factor)
            expected.step()
    assert torch.equal(w, plain)


def test_sparse_gradients_are_refused():
    embedding, w = torch.nn.Embedding(5, 2, sparse=True), start()
    optimizer = AvaGrad([w, *embedding.parameters()])
    (embedding(torch.tensor([1])).sum() + w.sum()).backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize(
    "bad",
    [
        {"lr": float("nan")},
        {"lr": -1.0},
        {"eps": 0.0},
        {"eps": float("nan")},
        {"betas": (0.9, 1.0)},
        {"betas": (float("nan"), 0.9)},
        {"weight_decay": float("inf")},
        {"variant": "adam"},
        {"gamma_scope": "layer"},
        {"variant": "reference", "gamma_scope": "global"},
    ],
    ids=str,
)
def test_bad_hyperparameters_are_refused(bad):
    with pytest.raises(ValueError, match="AvaGrad: "):
        AvaGrad([start()], **bad)
    with pytest.raises(ValueError, match="AvaGrad: "):
        AvaGradConfig(**bad)


def test_bad_group_override_is_refused():
    with pytest.raises(ValueError, match="lr must be"):
        AvaGrad([{"params": [start()], "lr": float("nan")}])


def test_composite_steps_and_restores_its_parts():
    model, x, y = model_and_data()

    def build(m):
        return CompositeOptimizer(AvaGrad(m[0].parameters()), torch.optim.Adam(m[2].parameters(), lr=1e-2))

    optimizer = build(model)
    train(model, optimizer, x, y, steps=3)
    copied = copy.deepcopy(model)
    other = build(copied)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(train(model, optimizer, x, y, steps=3), train(copied, other, x, y, steps=3))
    with pytest.raises(ValueError, match="2 parameter groups, this run has 1"):
        CompositeOptimizer(AvaGrad([start()])).load_state_dict(optimizer.state_dict())
