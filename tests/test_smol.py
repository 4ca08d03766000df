"""SMOL: its equations against closed forms, the budget of bits, and training that is exact when repeated."""

import math

import pytest
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from helpers import (
    assert_resumes_after_crash,
    assert_same_weights,
    every_latent,
    make_trainer,
    stacked,
    trained_weight,
    weights,
)
from hf_approx import SmolConfig
from hf_approx.methods.noise import draw, noise_keys
from hf_approx.methods.precision import precision
from hf_approx.packing.grid import expand, round_to_grid
from models import build
from test_trainer import assert_close_weights, no_dropout


def smol_on(layer, **options):
    """The stack and the method on one layer, in a model of it alone."""
    config = {"target_modules": ["0"], "target_bits": None, **options}
    return stacked(nn.ModuleList([layer]), SmolConfig(**config))


def quadratic(noise, **options):
    """A layer of 4 outputs whose rows are 256 draws of one weight each, near zero and at scale 1."""
    layer = nn.Linear(256, 4, bias=False)
    nn.init.constant_(layer.weight, 1e-12)
    stack, method = smol_on(layer, granularity="channel", noise=noise, train_scale=False, **options)
    method.noises[0].log_scale.data.zero_()
    return layer, stack, method


@pytest.mark.parametrize(("noise", "factor"), [("uniform", 1 / 6), ("rademacher", 1 / 2)])
def test_noise_costs_what_the_second_order_says(noise, factor):
    """S1: E L(w + sigma eps) - L(w) is a known multiple of sum H sigma^2, for a quadratic L."""
    layer, stack, method = quadratic(noise)
    curvature = torch.tensor([0.1, 1.0, 10.0, 100.0])
    sigma = torch.tensor([0.9, 0.5, 0.2, 0.05])
    method.noises[0].limits.data.copy_(torch.logit(sigma)[:, None])
    losses = []
    for step in range(400):
        method.noises[0].step = step
        stack.write()
        losses.append(float((curvature[:, None] * layer.weight.detach() ** 2 / 2).sum(0).mean()))
    expected = factor * float((curvature * sigma**2).sum())
    assert sum(losses) / len(losses) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("noise", ["uniform", "rademacher"])
def test_learned_precisions_are_those_of_the_closed_form(noise):
    """S1: H sigma^2 = 3 lambda / ln 2 (uniform) or lambda / ln 2 (rademacher) where gradient and penalty balance."""
    curvature, lambda_ = torch.tensor([0.1, 1.0, 10.0, 100.0]), 1e-2
    layer, stack, method = quadratic(noise, initial_bits=4.0, penalty=lambda_ / 256, noise_fraction=1.0)
    limits = method.noises[0].limits
    optimizer = torch.optim.Adam([limits], lr=3e-2)
    learned = []
    for step in range(1500):
        stack.advance(step / 1500)
        (curvature[:, None] * layer.weight**2 / 2).mean(1).sum().backward()
        stack.before_step()
        optimizer.step()
        stack.zero_grad()
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / 1500)
        learned.append(precision(limits.detach()).reshape(-1))
    times = 3 if noise == "uniform" else 1
    expected = 1 + 0.5 * torch.log2(curvature * math.log(2) / (times * lambda_))
    torch.testing.assert_close(torch.stack(learned[-300:]).mean(0), expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_gradient_is_straight_through_inside_the_clip_range_only(bits):
    layer = nn.Linear(6, 1, bias=False)
    layer.weight.data = torch.tensor([[-1.9, -0.4, 0.3, 0.6, 0.99, 1.99]])
    options = {"granularity": "tensor", "scale_granularity": "tensor", "bits": (bits,), "noise_fraction": 0.0}
    stack, method = smol_on(layer, **options)
    stack.settle()
    noise = method.noises[0]
    noise.log_scale.data.zero_()
    stack.write()
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    (layer.weight * upstream).sum().backward()
    stack.before_step()
    original = trained_weight(layer)
    inside = original.detach().abs() <= 2 - 2.0 ** (1 - bits)
    assert torch.equal(original.grad, upstream * inside)
    error = layer.weight.detach() - original.detach() * inside
    torch.testing.assert_close(noise.log_scale.grad, (upstream * error).sum().reshape(1, 1))


def test_gradients_of_noisy_weights_are_those_of_the_formula():
    """Against autograd through w_eff = scale (clip(w / scale) + sigma(s) eps), with s kept out of the clip range."""
    torch.manual_seed(0)
    layer = nn.Linear(10, 3, bias=False)
    stack, method = smol_on(layer, granularity="group", group_size=4, noise_fraction=1.0, initial_bits=3.0)
    noise = method.noises[0]
    noise.limits.data.normal_(0, 1)
    method._tell()
    stack.write()
    upstream = torch.randn(3, 10)
    (layer.weight * upstream).sum().backward()
    stack.before_step()
    w = trained_weight(layer).detach().clone().requires_grad_()
    s = noise.limits.detach().clone().requires_grad_()
    scale, eps = noise.scale, draw(w.shape, noise_keys(0, noise.step, [0], w), "uniform")
    sigma = torch.sigmoid(s).repeat_interleave(4, 1)[:, :10]
    limit = (2 - sigma.detach()) * scale
    expected = torch.minimum(torch.maximum(w, -limit), limit) + scale * sigma * eps
    assert noise.limits.shape == (3, 3)
    torch.testing.assert_close(layer.weight.detach(), expected.detach())
    (expected * upstream).sum().backward()
    torch.testing.assert_close(trained_weight(layer).grad, w.grad)
    torch.testing.assert_close(noise.limits.grad, s.grad, rtol=1e-4, atol=1e-6)


def test_the_penalty_has_the_gradient_of_the_specification():
    """S3: d penalty / ds = -sigma(-s) / ln 2 for each weight the limit governs."""
    layer = nn.Linear(10, 3, bias=False)
    stack, method = smol_on(layer, granularity="group", group_size=4, penalty=0.5)
    stack.before_step()
    limits = method.noises[0].limits
    expected = -0.5 * torch.tensor([4.0, 4.0, 2.0]) * torch.sigmoid(-limits.detach()) / math.log(2)
    torch.testing.assert_close(limits.grad, expected)


def test_without_noise_the_layer_computes_what_it_did():
    """S3: as sigma goes to zero, and while evaluating at any sigma."""
    layer = nn.Linear(16, 8).double()
    weight = layer.weight.detach().clone()
    stack, method = smol_on(layer, bits=(8,), initial_bits=8.0)
    span = weight.abs().amax(1, keepdim=True)
    method.noises[0].log_scale.data.copy_(span.log())
    stack.write()
    assert not torch.equal(layer.weight, weight)
    with stack.evaluating():
        assert torch.equal(layer.weight, weight)
    assert not torch.equal(layer.weight, weight)
    method.noises[0].limits.data.fill_(-20)
    stack.write()
    torch.testing.assert_close(layer.weight, weight, atol=1e-8, rtol=0)


def test_noise_is_the_same_in_a_step_and_fresh_in_the_next():
    layer = nn.Linear(16, 8)
    stack, _ = smol_on(layer, noise_fraction=1.0)
    stack.advance(0.0)
    first = layer.weight.detach().clone()
    assert not torch.equal(first, trained_weight(layer))
    stack.write()
    assert torch.equal(layer.weight, first)
    torch.rand(5)
    stack.write()
    assert torch.equal(layer.weight, first)
    stack.advance(0.1)
    assert not torch.equal(layer.weight, first)


def test_noise_differs_between_modules_and_seeds():
    shape, like = torch.Size([100]), torch.zeros(0)
    keys = [noise_keys(0, 1, [0, 1], like), noise_keys(1, 1, [0], like), noise_keys(0, 2, [0], like)]
    drawn = [*draw(torch.Size([2, 100]), keys[0], "uniform"), *(draw(shape, key, "uniform") for key in keys[1:])]
    assert all(not (a == b).any() for i, a in enumerate(drawn) for b in drawn[:i])
    assert torch.equal(drawn[0], draw(shape, keys[0][:1], "uniform"))
    assert torch.equal(drawn[1][30:], draw(torch.Size([70]), keys[0][1:], "uniform", first=30))
    assert set(draw(shape, keys[1], "rademacher").tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("law", ["uniform", "rademacher"])
def test_noise_is_independent_of_place_module_and_step(law):
    like = torch.zeros(0)
    size = 1 << 16
    rows = [draw(torch.Size([size]), noise_keys(0, step, [index], like), law) for step in (0, 1) for index in (0, 1)]
    for row in rows:
        assert float(row.abs().max()) <= 1
        assert float(row.mean()) == pytest.approx(0.0, abs=5 / size**0.5)
        assert float(row.square().mean()) == pytest.approx(1 / 3 if law == "uniform" else 1.0, abs=0.01)
        assert float((row[1:] * row[:-1]).mean()) == pytest.approx(0.0, abs=5 / size**0.5)
    for i, row in enumerate(rows):
        for other in rows[:i]:
            for shift in (0, 1, 64):
                assert float((row * other.roll(shift)).mean()) == pytest.approx(0.0, abs=5 / size**0.5)


def test_a_target_that_whole_parts_cannot_meet_is_refused_and_changes_nothing():
    model = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
    before = weights(model)
    with pytest.raises(ValueError, match=r"2 parts .* cannot average 2.25 bits"):
        stacked(model, SmolConfig(target_modules=["0", "1"], target_bits=2.25, granularity="tensor"))
    assert not every_latent(model)
    assert_same_weights(weights(model), before)


def test_a_budget_that_zeros_put_out_of_reach_is_warned_of(caplog):
    """Parts of 32 and 64 weights average 7 / 3 or 8 / 3 bits, never 2.5, which two of 64 could."""
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[0].weight.data[:, ::2] = 0
    config = SmolConfig(target_modules=["0", "1"], target_bits=2.5, granularity="tensor")
    stack, method = stacked(model, config)
    stack.settle()
    assert [record.getMessage() for record in caplog.records] == [
        f"SmolConfig: the precisions of 2 parts average {method.metrics()['bits']:.3f} bits instead of 2.5; choose a "
        "finer granularity than 'tensor' or that target."
    ]


def test_stored_weights_are_clipped_to_the_range_of_their_precision_unless_frozen():
    for trains in (True, False):
        layer = nn.Linear(64, 4, bias=False)
        layer.weight.data[0, 0] = 50.0
        stack, method = smol_on(layer, target_bits=3.0, train_weights=trains)
        stack.advance(0.0)
        stored = trained_weight(layer)
        bound = float(method.noises[0].bound().max())
        assert bound < 30
        assert float(stored[0, 0]) == (pytest.approx(bound) if trains else 50.0)
        assert stored.requires_grad == trains
        stack.detach()
        assert layer.weight.requires_grad


def test_a_tighter_penalty_where_gradients_are_large_keeps_more_bits():
    """Curvatures 100 times apart differ by log2(10) bits at any budget, whatever Adam makes of their gradients."""
    options = {"target_bits": 4.0, "initial_bits": 4.0, "noise_fraction": 1.0, "limit_init": "constant"}
    layer, stack, method = quadratic("uniform", **options)
    curvature = torch.tensor([0.1, 0.1, 10.0, 10.0])
    optimizer = torch.optim.Adam([method.noises[0].limits], lr=2e-2)
    for step in range(600):
        stack.advance(step / 600)
        (curvature[:, None] * layer.weight**2 / 2).mean(1).sum().backward()
        stack.before_step()
        optimizer.step()
        stack.zero_grad()
    bits = precision(method.noises[0].limits.detach()).reshape(-1)
    assert float(bits.mean()) == pytest.approx(4.0, abs=0.02)
    assert float(bits[2:].mean() - bits[:2].mean()) == pytest.approx(0.5 * math.log2(100), abs=0.15)


@pytest.mark.parametrize("granularity", ["group", "channel", "weight"])
def test_limits_start_where_squared_gradients_say(granularity):
    """Gradients of rows four times apart, of the same scale, are two bits apart; they come to the assignment."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 4, bias=False)
    options = {"target_bits": 4.0, "train_scale": False, "lr": 0.0, "noise_fraction": 1.0}
    stack, method = smol_on(layer, granularity=granularity, **options)
    method.noises[0].log_scale.data.zero_()
    size = torch.tensor([[1.0], [1.0], [4.0], [4.0]])
    for step in range(100):
        stack.advance(step / 200)
        stack.zero_grad()
        (layer.weight * size * torch.randn(4, 512)).sum().backward()
        stack.before_step()
    bits = precision(method.noises[0].limits.detach()).reshape(4, -1).mean(1)
    assert float(bits[2:].mean() - bits[:2].mean()) == pytest.approx(2.0, abs=0.4)
    stack.finalize()
    assigned = expand(method.grids["0.weight"].bits, layer.weight.shape).float()
    assert float(assigned.mean()) == pytest.approx(4.0, abs=0.02)
    assert float(assigned[2:].mean() - assigned[:2].mean()) == pytest.approx(2.0, abs=0.5)


LAYERS = {
    "linear": lambda: nn.Linear(12, 6),
    "conv1d": lambda: Conv1D(6, 12),
    "conv2d": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "embedding": lambda: nn.Embedding(12, 6),
}


@pytest.mark.parametrize("granularity", ["weight", "group", "channel", "tensor"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_ends_on_its_grid(kind, granularity):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    stack, method = smol_on(layer, target_bits=3.0, granularity=granularity, group_size=5)
    for progress in (0.0, 0.4, 0.6):
        stack.advance(progress)
        layer.weight.square().sum().backward()
        stack.before_step()
    assert stack.finalize() == ["0.weight"]
    grid = method.grids["0.weight"]
    assert type(layer) is type(LAYERS[kind]())
    assert torch.equal(round_to_grid(layer.weight, grid), layer.weight)
    out = {"conv1d": 6, "linear": 6, "conv2d": 4, "transposed": 4, "embedding": 12}[kind]
    assert grid.scale.numel() == out
    assert float(expand(grid.bits, layer.weight.shape).float().mean()) == pytest.approx(3.0, abs=0.02)


def test_zeros_stay_zero_and_count_nothing():
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data[:, ::2] = 0
    layer.weight.data[0] = 0
    stack, method = smol_on(layer, target_bits=2.5, granularity="weight")
    assert (layer.weight[:, ::2] == 0).all()
    stack.settle()
    assert method.metrics()["bits"] == pytest.approx(2.5, abs=0.02)
    stack.finalize()
    grid = method.grids["0.weight"]
    assert torch.equal(grid.bits == 0, layer.weight == 0)
    assert float(grid.bits[layer.weight != 0].float().mean()) == pytest.approx(2.5, abs=0.02)


def test_targets_by_pattern_are_met_one_by_one():
    model = nn.ModuleDict({"a": nn.Linear(64, 16), "b": nn.Linear(64, 32)})
    config = SmolConfig(target_modules=["a", "b"], target_bits={"a": 2.5, "b": 5.0}, group_size=4)
    stack, method = stacked(model, config)
    stack.finalize()
    means = {n: float(expand(g.bits, model.get_parameter(n).shape).float().mean()) for n, g in method.grids.items()}
    assert means == {"a.weight": pytest.approx(2.5, abs=0.02), "b.weight": pytest.approx(5.0, abs=0.02)}
    with pytest.raises(ValueError, match="target_bits has no pattern for 'b'"):
        stacked(
            nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}),
            SmolConfig(target_modules=["a", "b"], target_bits={"a": 2.5}),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bits": 0.5}, "target_bits must be between 1 and 8"),
        ({"target_bits": 3.0, "bits": (4, 8)}, "target_bits must be between 4 and 8"),
        ({"target_bits": {}}, "no pattern"),
        ({"bits": (4, 2)}, "rising whole numbers"),
        ({"bits": (2, 16)}, "rising whole numbers"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"noise": "gaussian"}, "noise must be one of"),
        ({"limit_init": "random"}, "limit_init must be one of"),
        ({"noise_fraction": 1.5}, "noise_fraction"),
        ({"lr": float("nan")}, "lr must be"),
        ({"group_size": 0}, "group_size"),
    ],
)
def test_impossible_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SmolConfig(**options)


class Record(TrainerCallback):
    """Keeps the gradients of the limits at every step."""

    def __init__(self, method, kept):
        self.method, self.kept = method, kept

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.method.is_final:
            self.kept.append(torch.cat([p.limits.grad.reshape(-1).clone() for p in self.method.noises]))


SMOL = SmolConfig(target_bits=3.0, group_size=16)


@pytest.mark.parametrize("granularity", ["group", "weight"])
@pytest.mark.parametrize("crash", [3, 6], ids=["noise", "rounded"])
def test_a_crashed_run_resumes_to_the_same_weights(tmp_path, crash, granularity):
    approx = SmolConfig(target_bits=3.0, group_size=16, granularity=granularity, activations=True)

    def trainer(folder):
        return make_trainer("bert", folder, approx=approx, save_strategy="steps", save_steps=1, bf16=True)

    straight = assert_resumes_after_crash(trainer, tmp_path, crash)
    assert straight.approx_report["totals"]["bits"] == pytest.approx(3.0, abs=0.02)


def run(folder, approx=SMOL, **options):
    trainer = make_trainer("bert", folder, approx=approx, model=no_dropout(), **options)
    trainer.train()
    return trainer


def test_gradient_checkpointing_sees_the_same_noise(tmp_path):
    approx = SmolConfig(target_bits=3.0, group_size=16, noise_fraction=1.0, activations=True)
    plain = run(tmp_path / "a", approx)
    checkpointed = run(tmp_path / "b", approx, gradient_checkpointing=True)
    assert_close_weights(plain, checkpointed, rtol=1e-4, atol=1e-5)


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    """The micro-batches of a step see the same noise, and the penalty is added once."""

    def gradients(folder, **batching):
        approx = SmolConfig(target_bits=None, penalty=1e-4, noise_fraction=1.0, lr=1e-3)
        options = {"max_steps": 4, "weight_decay": 0.0, "optim": "sgd", **batching}
        trainer = make_trainer("llama", folder, approx=approx, model=build("llama"), **options)
        kept = []
        trainer.add_callback(Record(trainer.methods[0], kept))
        trainer.train()
        return kept

    whole = gradients(tmp_path / "a", per_device_train_batch_size=8)
    parts = gradients(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert len(whole) == 3  # the last of four steps has rounded weights
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_compiled_training_equals_eager(tmp_path):
    eager = run(tmp_path / "a", max_steps=6)
    compiled = run(tmp_path / "b", max_steps=6, torch_compile=True, torch_compile_backend="aot_eager")
    assert_close_weights(eager, compiled, rtol=1e-3, atol=1e-4)


def test_training_logs_and_reports_bits(tmp_path):
    trainer = run(tmp_path)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    bits = [entry["smol/bits"] for entry in logged]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > bits[-1] == pytest.approx(3.0, abs=0.02)
    assert "smol/penalty" in logged[0]
    report = trainer.approx_report["methods"][0]
    assert sum(report["shares"].values()) == pytest.approx(1)
    assert sum(int(p) * share for p, share in report["shares"].items()) == pytest.approx(report["bits"])
    assert report["bits_with_metadata"] > report["bits"]
    grids = trainer.methods[0].grids
    model = dict(trainer.model.named_parameters())
    assert all(torch.equal(round_to_grid(model[name], grid), model[name]) for name, grid in grids.items())


def test_every_architecture_trains(tmp_path):
    for name in ("gpt2", "vit", "t5", "resnet"):
        model = build(name)
        trainer = make_trainer(name, tmp_path / name, approx=SMOL, model=model, max_steps=3)
        trainer.train()
        assert trainer.approx_report["totals"]["bits"] == pytest.approx(3.0, abs=0.02)
