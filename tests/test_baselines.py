"""The pruning baselines, and targets by pattern, which every pruning method understands."""

import pytest
import torch
from torch import nn

from helpers import make_trainer, stacked
from hf_approx import MagnitudePruningConfig, MovementPruningConfig, SparsificationConfig
from hf_approx.methods.budget import cubic_ramp, plan, threshold, top_masks
from hf_approx.methods.movement import MovementMask
from models import build


def two_layers():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(10, 10, bias=False), nn.Linear(10, 20, bias=False)])


def zeros(model):
    return [float((layer.weight == 0).float().mean()) for layer in model]


def drive(stack, steps=20, lr=0.05):
    model = stack.model
    optimizer = stack.bind(torch.optim.SGD(stack.parameters(), lr=lr), steps=steps)
    x, y = torch.randn(64, 10), torch.randn(64, 20)
    for _ in range(steps):
        nn.functional.mse_loss(model[1](model[0](x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()


ALL = {
    "cs": lambda **o: SparsificationConfig(**o),
    "gradual": lambda **o: MagnitudePruningConfig(**o, update_every=1),
    "one-shot": lambda **o: MagnitudePruningConfig(**o, ramp_fraction=0.0),
    "random": lambda **o: MagnitudePruningConfig(**o, criterion="random"),
    "movement": lambda **o: MovementPruningConfig(**o),
    "soft movement": lambda **o: MovementPruningConfig(**o, mode="soft", penalty=1.0),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", [0.9, {"0": 0.5, "1": 0.95}], ids=["global", "by pattern"])
def test_every_method_meets_its_targets(name, target):
    model = two_layers()
    stack, method = stacked(model, ALL[name](target_sparsity=target, target_modules=["0", "1"]))
    drive(stack)
    assert method.is_final
    stack.finalize()
    if isinstance(target, dict):
        assert zeros(model) == pytest.approx([0.5, 0.95])
    else:
        assert zeros(model)[0] * 100 + zeros(model)[1] * 200 == pytest.approx(0.9 * 300)


@pytest.mark.parametrize("name", ALL)
def test_a_module_without_a_target_is_named(name):
    model = two_layers()
    with pytest.raises(ValueError, match="no pattern for '1'"):
        stacked(model, ALL[name](target_sparsity={"0": 0.5}, target_modules=["0", "1"]))
    assert dict(model.named_parameters()).keys() == {"0.weight", "1.weight"}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("target", [1.5, float("nan"), {}, {"0": -1.0}, "0.9", True], ids=str)
def test_impossible_targets_are_refused(name, target):
    with pytest.raises(ValueError, match="target_sparsity"):
        ALL[name](target_sparsity=target)


def test_one_shot_prunes_before_the_first_step_and_random_ignores_size():
    model = two_layers()
    size = model[0].weight.detach().abs()
    for config, sorted_by_size in (
        (MagnitudePruningConfig(target_sparsity=0.5, ramp_fraction=0.0, scope="layer", target_modules=["0"]), True),
        (
            MagnitudePruningConfig(target_sparsity=0.5, ramp_fraction=0.0, criterion="random", target_modules=["0"]),
            False,
        ),
    ):
        stack, method = stacked(model, config)
        stack.advance(0.0)
        assert method.is_final
        kept = model[0].weight != 0
        assert int(kept.sum()) == 50
        assert bool(size[kept].min() >= size[~kept].max()) == sorted_by_size
        stack.detach()


def test_random_order_is_that_of_its_seed():
    def kept(seed):
        model = two_layers()
        config = MagnitudePruningConfig(target_sparsity=0.5, criterion="random", seed=seed, target_modules=["0"])
        stacked(model, config)[0].settle()
        return model[0].weight != 0

    assert torch.equal(kept(1), kept(1))
    assert not torch.equal(kept(1), kept(2))


def test_movement_gradient_is_the_straight_through_one():
    """Sanh et al., equation 3: dL/dS = dL/dW' * W, also where the mask is zero."""
    weight = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    mask = MovementMask(weight, 0.0)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([1.0, -1.0, 2.0]))
    out = mask(weight)
    assert out.tolist() == [0.5, 0.0, 3.0]
    with torch.no_grad():
        of_weight = mask.pull(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64), weight, out)
    assert mask.scores.grad.tolist() == [0.5, -20.0, 300.0]
    assert of_weight.tolist() == [1.0, 0.0, 100.0]


def test_movement_keeps_what_grows():
    """Weights pulled away from zero stay, larger ones that are pulled towards it go."""
    model = nn.ModuleList([nn.Linear(4, 1, bias=False)])
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 0.1, 1.0, 1.0]]))
    goal = torch.tensor([[1.0, 1.0, 0.2, 0.2]])
    config = MovementPruningConfig(target_sparsity=0.5, target_modules=["0"], ramp_fraction=0.9)
    stack, method = stacked(model, config)
    optimizer = torch.optim.Adam(method.param_groups())
    for step in range(20):
        stack.advance(step / 19)
        if step < 5:
            ((model[0].weight - goal) ** 2).sum().backward()
            stack.before_step()
            optimizer.step()
            stack.after_step()
    stack.finalize()
    assert (model[0].weight != 0).tolist() == [[True, True, False, False]]


def test_movement_masks_no_more_than_the_ramp_where_scores_are_equal():
    """After one step of Adam every score is plus or minus its learning rate."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False))
    config = MovementPruningConfig(target_sparsity=0.8, target_modules=["0"], ramp_fraction=1.0)
    stack, method = stacked(model, config)
    with torch.no_grad():
        method.masks[0].scores.copy_(torch.where(torch.arange(32) % 2 == 0, 0.01, -0.01).expand(32, 32))
    stack.advance(0.01)
    assert int((model[0].weight == 0).sum()) <= cubic_ramp(0.01, 0.8) * 1024
    stack.advance(1.0)
    assert int((model[0].weight == 0).sum()) == round(0.8 * 1024)


def test_soft_movement_penalty_lowers_the_scores():
    model = two_layers()
    stack, method = stacked(model, MovementPruningConfig(mode="soft", penalty=5.0, target_modules=["0", "1"]))
    assert method.penalty().item() == pytest.approx(2.5)
    drive(stack, steps=10)
    assert method.metrics()["sparsity"] > 0


@pytest.mark.parametrize(
    "bad",
    [{"mode": "hard"}, {"mask_lr": -1.0}, {"penalty": float("nan")}, {"ramp_fraction": 2.0}, {"threshold": 0.7}],
    ids=str,
)
def test_bad_movement_config(bad):
    with pytest.raises(ValueError, match="MovementPruningConfig: "):
        MovementPruningConfig(**bad)


def test_movement_under_the_trainer(tmp_path):
    trainer = make_trainer("bert", tmp_path, approx=MovementPruningConfig(target_sparsity=0.8))
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_targets_by_pattern_on_a_transformer(tmp_path):
    target = {"query": 0.9, "key": 0.9, "value": 0.9, "dense": 0.5}
    trainer = make_trainer("bert", tmp_path, approx=SparsificationConfig(target_sparsity=target))
    trainer.train()
    layers = list(trainer.model.bert.encoder.layer)
    attention = torch.cat([layer.attention.self.query.weight.reshape(-1) for layer in layers])
    attention = torch.cat([attention, *(layer.attention.self.key.weight.reshape(-1) for layer in layers)])
    dense = torch.cat([layer.output.dense.weight.reshape(-1) for layer in layers])
    assert float((attention == 0).float().mean()) > 0.8
    assert float((dense == 0).float().mean()) < 0.7


def test_plan_and_masks():
    groups = plan(["a.q", "a.k", "b.q"], {"q": 0.5, "a.k": 0.0}, "global")
    assert [(g.members, g.target) for g in groups] == [((0, 2), 0.5), ((1,), 0.0)]
    scores = [torch.tensor([4.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 2.0])]
    assert [m.tolist() for m in top_masks(scores, groups)] == [[True, False], [True, True], [True, False]]
    assert len(plan(["a", "b"], 0.5, "layer")) == 2
    assert threshold([torch.arange(100.0)], 0.3).item() == 29.0


def test_names_of_the_default_targets():
    config = MagnitudePruningConfig(target_sparsity={"query": 0.5}, target_modules=["query"])
    _, method = stacked(build("bert"), config)
    assert len(method.modules) == 2
