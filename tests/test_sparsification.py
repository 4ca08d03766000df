"""Continuous Sparsification and gradual magnitude pruning against the published numbers."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import every_latent, stacked
from hf_approx.methods import MagnitudePruningConfig, SparsificationConfig
from hf_approx.methods.budget import cubic_ramp, global_top_k
from hf_approx.methods.sparsification import SigmoidMask
from models import ARCHITECTURES, build


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 8), nn.Linear(8, 2)
    )


def drive(model, stack, steps=20, lr=1e-2):
    """A plain loop: what any user without a Trainer would write. Schedules are those of the step that comes."""
    optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=lr, weight_decay=0.1), steps=steps)
    x, y = torch.randn(32, 3, 8, 8), torch.randint(0, 2, (32,))
    for step in range(steps):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def test_b1_soft_mask_converges_to_the_hard_one():
    scores = torch.tensor([-0.3, -0.03, 0.03, 0.5], dtype=torch.float64)
    mask = SigmoidMask(scores.clone(), 200.0)
    assert (mask.mask() - (scores > 0).double()).abs().max() <= math.exp(-200 * 0.03)
    with torch.no_grad():
        mask.scores.copy_(torch.where(scores > 0, math.inf, -math.inf))
    assert torch.equal(mask.mask(), (scores > 0).double())


def test_masks_make_no_subnormal_weights():
    """CPUs may take a hundred times as long to multiply matrices of them."""
    scores, weight = torch.linspace(-0.6, 0.6, 601), torch.full((601,), 0.01)
    product, tiny = SigmoidMask(scores, 200.0)(weight), torch.finfo(torch.float32).tiny
    exact = 0.01 / (1 + torch.exp(-200.0 * scores.double()))
    assert bool((exact < tiny).any())
    assert not bool(((product != 0) & (product < tiny)).any())
    torch.testing.assert_close(product.double(), exact, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_b2_gradient_of_the_scores(scale):
    mask = SigmoidMask(torch.tensor([-0.2, -0.03, 0.0, 0.05], dtype=torch.float64), 50.0, scale)
    weight = torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)
    mask(weight).backward(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64))
    expected = torch.tensor([0.0006809371, -10.4402516449, 41.25, 2.8041486618], dtype=torch.float64)
    torch.testing.assert_close(mask.scores.grad, scale * expected, rtol=0, atol=1e-9 * 10)


def test_penalty_and_its_gradient_match_the_closed_form():
    model = nn.ModuleList([nn.Linear(4, 3, bias=False)])
    config = SparsificationConfig(target_sparsity=None, preset="paper", penalty=0.3, initial_score=0.1)
    stack, method = stacked(model, config)
    stack.advance(0.25)
    stack.before_step()
    beta, c, s = 200**0.5, 1 + math.exp(-0.1), 0.1
    m = 1 / (1 + math.exp(-beta * s))
    assert method.penalty().item() == pytest.approx(0.3 * c * 12 * m, rel=1e-6)
    torch.testing.assert_close(
        method.masks[0].scores.grad, torch.full((3, 4), 0.3 * c * beta * m * (1 - m)), rtol=1e-5, atol=1e-8
    )


def test_b3_temperature_is_geometric_over_the_soft_phase():
    config = SparsificationConfig(target_sparsity=None, preset="paper", soft_fraction=1.0)
    stack, method = stacked(nn.ModuleList([nn.Linear(2, 2)]), config)
    seen = []
    for epoch in range(84):
        stack.advance(epoch / 84)
        seen.append(method.metrics()["temperature"])
    assert seen[0] == pytest.approx(1.0)
    assert seen[1] / seen[0] == pytest.approx(1.06510694, rel=1e-6)
    assert seen[42] == pytest.approx(14.1421, rel=1e-5)
    stack.advance(1.0)
    assert method.is_final


@pytest.mark.parametrize("s0", [-0.3, 0.0, 0.5])
@pytest.mark.parametrize("target", [None, 0.9])
def test_b6_paper_mask_starts_at_exactly_one(s0, target):
    model = small_net()
    before = model(torch.ones(1, 3, 8, 8))
    config = SparsificationConfig(preset="paper", initial_score=s0, target_sparsity=target, target_modules=["0", "4"])
    stack, _ = stacked(model, config)
    stack.advance(0.0)
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), before)


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
@pytest.mark.parametrize("s0", [-0.4, 0.0, 0.4])
def test_scores_that_start_equal_come_down_without_a_jump(s0, granularity):
    model = nn.ModuleList([nn.Linear(32, 16, bias=False)])
    config = SparsificationConfig(
        preset="scratch", initial_score=s0, target_sparsity=0.5, granularity=granularity, soft_fraction=1.0
    )
    stack, method = stacked(model, config)
    scores = method.masks[0].scores
    quarter = []
    for step in range(100):
        before = scores.detach().clone()
        stack.advance(step / 100)
        assert (scores - before).abs().max() <= abs(s0) / 10 + 1e-6
        quarter.append(scores.detach().mean().item())
    if granularity == "2:4":  # pulled by a force that grows, instead of set
        assert abs(quarter[-1]) < 0.01
        return
    assert quarter[0] == pytest.approx(s0)
    assert quarter[12] == pytest.approx(s0 * (1 - 0.12 / 0.25), abs=1e-5)
    assert quarter[25] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("preset", ["pretrained", "scratch", "paper"])
def test_every_preset_reaches_the_target_by_itself(preset):
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)])
    stack, method = stacked(model, SparsificationConfig(preset=preset, target_sparsity=0.8))
    optimizer = torch.optim.Adam(method.param_groups())
    x = torch.randn(64, 32)
    for step in range(200):
        stack.advance(step / 199)
        model[1](model[0](x)).square().mean().backward()
        stack.before_step()
        optimizer.step()
        stack.after_step()
    report = method.report()
    assert report["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert abs(report["last_correction"]) < 0.02
    assert report["learned_sparsity"] + report["last_correction"] == pytest.approx(report["sparsity"])


def test_a_preset_can_be_replaced():
    config = dataclasses.replace(SparsificationConfig(mask_lr=0.5), preset="paper")
    assert config.settings().scale_mask
    assert config.settings().mask_lr == 0.5


def test_detaching_leaves_the_model_as_it_was():
    model = small_net()
    before = {name: param.clone() for name, param in model.named_parameters()}
    stack, _ = stacked(model, SparsificationConfig(target_modules=["0", "4"]))
    stack.settle()
    assert any(not torch.equal(before[name], param) for name, param in model.named_parameters())
    stack.detach()
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steering_sees_every_column():
    """With an even stride a power-of-two width would show it the first column only."""
    model = nn.ModuleList([nn.Linear(1024, 1024, bias=False)])
    stack, method = stacked(model, SparsificationConfig(target_sparsity=0.9))
    with torch.no_grad():
        method.masks[0].scores.copy_(torch.rand(1024, 1024))
        method.masks[0].scores[:, ::4] += 100.0
    stack.advance(0.6)
    wanted = cubic_ramp(0.6 / 0.75, 0.9)
    assert method.metrics()["sparsity"] == pytest.approx(wanted, abs=0.02)


def test_paper_scale_is_folded_into_the_weight():
    model = nn.ModuleList([nn.Linear(4, 4)])
    original = model[0].weight.detach().clone()
    stack, _ = stacked(model, SparsificationConfig(target_sparsity=0.5, preset="paper"))
    stack.settle()
    stack.finalize()
    kept = model[0].weight != 0
    assert int(kept.sum()) == 8
    torch.testing.assert_close(model[0].weight[kept], 2.0 * original[kept])


@pytest.mark.parametrize("config", [SparsificationConfig, MagnitudePruningConfig])
@pytest.mark.parametrize("target", [0.0, 0.5, 0.903, 1.0])
def test_target_is_met_exactly_and_pruned_weights_stay_zero(config, target):
    model = small_net()
    stack, method = stacked(model, config(target_sparsity=target, target_modules=["0", "4", "5"]))
    masks = None
    for _ in drive(model, stack):
        if method.is_final:
            now = [m.weight.detach() != 0 for m in method.modules.values()]
            masks = masks or now
            assert all(torch.equal(a, b) for a, b in zip(masks, now, strict=True))
    assert masks is not None
    names = stack.finalize()
    params = dict(model.named_parameters())
    total = sum(params[n].numel() for n in names)
    assert sum(int((params[n] == 0).sum()) for n in names) == pytest.approx(target * total, abs=0.5)
    assert all(not torch.signbit(params[n][params[n] == 0]).any() for n in names)
    assert not every_latent(model)


def test_sparsity_follows_the_ramp_during_the_soft_phase():
    model = small_net()
    stack, method = stacked(model, SparsificationConfig(target_sparsity=0.8, target_modules=["4"]))
    for step in drive(model, stack, steps=41):
        if 0 < step < 29:
            ramp = cubic_ramp((step + 1) / 40 / 0.75, 0.8)
            assert method.metrics()["sparsity"] == pytest.approx(ramp, abs=0.06)


def test_learned_scores_differ_from_magnitude():
    model = small_net()
    original = model[4].weight.detach().clone()
    stack, method = stacked(model, SparsificationConfig(target_sparsity=0.5, target_modules=["4"], mask_lr=0.05))
    list(drive(model, stack, steps=40))
    by_magnitude = global_top_k([original.abs()], original.numel() // 2)[0]
    assert (by_magnitude != (method.masks[0].scores > 0)).any()


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(6, 4), torch.randn(2, 6)),
        (Conv1D(4, 6), torch.randn(2, 6)),
        (nn.Conv1d(6, 4, 1), torch.randn(2, 6, 5)),
        (nn.Conv2d(6, 4, 1), torch.randn(2, 6, 5, 5)),
        (nn.Conv3d(6, 4, 1), torch.randn(2, 6, 5, 5, 5)),
        (nn.ConvTranspose2d(6, 4, 2), torch.randn(2, 6, 5, 5)),
        (nn.Embedding(6, 4), torch.tensor([[1, 2]])),
    ],
    ids=lambda v: type(v).__name__,
)
def test_every_kind_of_layer(layer, x):
    model = nn.ModuleDict({"layer": layer})
    stack, method = stacked(model, SparsificationConfig(target_sparsity=0.5, target_modules=["layer"]))
    model["layer"](x).sum().backward()
    stack.before_step()
    assert method.masks[0].scores.grad is not None
    assert method.masks[0].scores.grad.any()
    stack.finalize()
    assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_targets_are_the_layers_inside_the_blocks(name):
    model = build(name)
    _, method = stacked(model, SparsificationConfig())
    head = model.get_output_embeddings()
    for path, module in method.modules.items():
        assert module is not head
        assert not isinstance(module, nn.Embedding)
        assert "classifier" not in path
        assert "embed" not in path
    expected = {"bert": 12, "gpt2": 8, "llama": 14, "t5": 32, "vit": 12, "resnet": 5}
    assert len(method.modules) == expected[name]


def test_target_patterns_follow_peft():
    def names(**options):
        _, method = stacked(build("bert"), MagnitudePruningConfig(**options))
        return list(method.modules)

    assert names(target_modules=["query"]) == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    assert names(target_modules=r".*layer\.0\..*key") == ["bert.encoder.layer.0.attention.self.key"]
    assert len(names(exclude=["query", "key"])) == 8


def test_bad_targets_change_nothing():
    model = build("gpt2")
    before = {name: id(p) for name, p in model.named_parameters()}
    for options, message in (
        ({"target_modules": ["nowhere"]}, "No module of GPT2LMHeadModel matches"),
        ({"target_modules": ["c_attn", "ln_1"]}, "has no weight of two or more dimensions"),
        ({"target_modules": ["wte"]}, "tied"),
    ):
        with pytest.raises(ValueError, match=message):
            stacked(model, SparsificationConfig(**options))
    assert {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    "bad",
    [
        {"target_sparsity": 1.1},
        {"target_sparsity": float("nan")},
        {"preset": "best"},
        {"initial_temperature": 0.0},
        {"initial_temperature": 300.0},
        {"mask_lr": -1.0},
        {"penalty": float("inf")},
        {"soft_fraction": 2.0},
        {"score_init": "random"},
        {"score_init": "magnitude", "scale_mask": True},
        {"initial_score": float("nan")},
    ],
    ids=str,
)
def test_bad_sparsification_config(bad):
    with pytest.raises(ValueError, match="SparsificationConfig: "):
        SparsificationConfig(**bad)


@pytest.mark.parametrize(
    "bad", [{"target_sparsity": -0.1}, {"ramp_fraction": 2.0}, {"update_every": 0}, {"scope": "row"}], ids=str
)
def test_bad_magnitude_config(bad):
    with pytest.raises(ValueError, match="MagnitudePruningConfig: "):
        MagnitudePruningConfig(**bad)


def test_top_k_breaks_ties_without_missing_the_count():
    masks = global_top_k([torch.ones(3, 4), torch.ones(5)], 7)
    assert sum(int(m.sum()) for m in masks) == 7
    assert global_top_k([torch.tensor([3.0, 1.0, 2.0])], 2)[0].tolist() == [True, False, True]


def test_zhu_gupta_cubic():
    assert [cubic_ramp(x, 0.8) for x in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.7, 0.8, 0.8])


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_magnitude_pruning_removes_the_smallest(scope):
    model = nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)])
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(1.0, 101.0).reshape(10, 10))
        model[1].weight.copy_(torch.arange(201.0, 301.0).reshape(10, 10))
    stack, _ = stacked(model, MagnitudePruningConfig(target_sparsity=0.5, scope=scope))
    stack.settle()
    kept = [int((m.weight != 0).sum()) for m in model]
    assert kept == ([0, 100] if scope == "global" else [50, 50])
