"""Methods on the same weights: a mask first, then a grid."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from helpers import (
    assert_resumes_after_crash,
    assert_same_weights,
    every_latent,
    make_trainer,
    stacked,
    trained_weight,
    weights,
)
from hf_approx import MagnitudePruningConfig, MovementPruningConfig, SmolConfig, SparsificationConfig
from hf_approx import UniformQuantizationConfig as UniformConfig
from hf_approx.packing.grid import expand, round_to_grid
from models import build

CS = SparsificationConfig(target_sparsity=0.8)
SMOL = SmolConfig(target_bits=3.0, group_size=16)


@pytest.mark.parametrize("mask", [CS, MagnitudePruningConfig(target_sparsity=0.8), MovementPruningConfig()])
@pytest.mark.parametrize("grid", [SMOL, UniformConfig(bits=3), UniformConfig(bits=3, mode="round")])
def test_a_mask_and_a_grid_end_with_both(tmp_path, mask, grid):
    trainer = make_trainer("bert", tmp_path, approx=[mask, grid], max_steps=10)
    trainer.train()
    totals = trainer.approx_report["totals"]
    assert totals["sparsity"] == pytest.approx(mask.target_sparsity, abs=2e-3)
    assert totals["bits"] == pytest.approx(3.0, abs=0.02)
    params = dict(trainer.model.named_parameters())
    for name, on in trainer.methods[1].grids.items():
        assert torch.equal(round_to_grid(params[name], on), params[name])
        kept = params[name] != 0
        assert not bool((expand(on.bits, kept.shape) == 0)[kept].any())
    assert not every_latent(trainer.model)


@pytest.mark.parametrize("crash", [3, 7], ids=["soft", "hard"])
def test_a_crashed_stack_resumes_to_the_same_weights(tmp_path, crash):
    def trainer(folder):
        return make_trainer("bert", folder, approx=[CS, SMOL], save_strategy="steps", save_steps=1)

    assert_resumes_after_crash(trainer, tmp_path, crash)


def test_precisions_are_assigned_once_the_mask_is_hard(tmp_path):
    trainer = make_trainer("bert", tmp_path, approx=[CS, SMOL])
    stack, (cs, smol) = trainer.stack, trainer.methods
    assert smol.settles_at == cs.settles_at == 0.75
    for progress in (0.0, 0.5, 0.74, 0.75):
        stack.advance(progress)
        assert cs.is_final == smol.is_final == (progress == 0.75)
    for masked, mask in zip(smol.modules.values(), cs.masks, strict=True):
        assert torch.equal(masked.weight == 0, mask.scores == -torch.inf)


def stack_error(tmp_path, *configs):
    model = build("bert")
    before = weights(model)
    with pytest.raises(ValueError) as error:
        make_trainer("bert", tmp_path, approx=list(configs), model=model)
    assert_same_weights(weights(model), before)
    assert not every_latent(model)
    return str(error.value)


def test_stacks_that_make_no_sense_are_refused_and_leave_the_model_alone(tmp_path):
    early = SmolConfig(target_bits=3.0, group_size=16, noise_fraction=0.5)
    assert "over before the mask of sparsification is fixed, at 0.75" in stack_error(tmp_path, CS, early)
    assert "already sparsified by sparsification" in stack_error(tmp_path, CS, MagnitudePruningConfig())
    assert "already quantized by smol" in stack_error(tmp_path, SMOL, CS)
    assert "already quantized by uniform" in stack_error(tmp_path, CS, UniformConfig(), SMOL)
    heads = SparsificationConfig(granularity="head", target_sparsity=0.5)
    assert "removes whole units" in stack_error(tmp_path, heads, SMOL)


def test_weights_that_something_else_parametrized_are_refused(tmp_path):
    model, name = build("bert"), "bert.encoder.layer.0.output.dense"
    parametrize.register_parametrization(model.get_submodule(name), "weight", nn.Identity())
    with pytest.raises(ValueError, match=f"'{name}' computes its weight from other parameters"):
        make_trainer("bert", tmp_path, approx=[replace(SMOL, target_modules=[name])], model=model)
    method = make_trainer("bert", tmp_path, approx=[SMOL], model=model).methods[0]
    assert name not in method.modules
    assert name.replace(".0.", ".1.") in method.modules
    with pytest.raises(ValueError, match=r"Another method works on 'bert\.encoder\.layer\.0\.attention\.self\.query'"):
        stacked(model, SMOL)


def test_taking_the_second_method_off_leaves_the_first():
    model = nn.ModuleList([nn.Linear(8, 8)])
    dense = model[0].weight.detach().clone()
    stack, mask, grid = stacked(
        model,
        MagnitudePruningConfig(target_sparsity=0.5, target_modules=["0"], ramp_fraction=0.0),
        UniformConfig(bits=1, target_modules=["0"]),
    )
    stack.settle()
    masked = dense * mask.stages["0"].mask
    assert int((masked == 0).sum()) == 32
    assert not torch.equal(model[0].weight, masked)
    grid.detach()
    every_latent(model)[0].write()
    assert torch.equal(model[0].weight, masked)
    assert torch.equal(trained_weight(model[0]), dense)
    assert mask.finalize() == ["0.weight"]
    assert torch.equal(model[0].weight, masked)


def test_methods_on_different_weights_stay_apart(tmp_path):
    attention = SparsificationConfig(target_sparsity=0.8, target_modules=["query", "key", "value"])
    other = SmolConfig(target_bits=3.0, group_size=16, exclude=["query", "key", "value"])
    trainer = make_trainer("bert", tmp_path, approx=[attention, other])
    trainer.train()
    cut, rounded = (set(method.modules) for method in trainer.methods)
    assert not cut & rounded
    layer = trainer.model.bert.encoder.layer[0]
    assert float((layer.attention.self.query.weight == 0).float().mean()) > 0.5
    assert int((layer.output.dense.weight == 0).sum()) == 0
