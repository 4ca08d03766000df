"""Training on with models that were quantized before, and methods that do not go together."""

import logging

import pytest
import torch
from torch.nn.utils import parametrize
from transformers import AutoModelForSequenceClassification

from helpers import assert_same_weights, make_trainer, weights
from hf_approx import (
    MagnitudePruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach_packing,
    fold,
)
from models import batch, build

HEADS = SparsificationConfig(target_sparsity=0.5, granularity="head")
LAYERS = SparsificationConfig(target_sparsity=0.5, granularity="layer")
SMOL = SmolConfig(target_bits=4, group_size=16)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A saved model with quantized weights, and one with quantized inputs too."""
    folder = tmp_path_factory.mktemp("quantized")
    for name, config in (
        ("weights", UniformQuantizationConfig(bits=4)),
        ("inputs", SmolConfig(target_bits=4, granularity="channel", activations=True)),
    ):
        trainer = make_trainer("bert", folder / "run", [config], max_steps=4)
        trainer.train()
        trainer.save_model(str(folder / name))
    return folder


def load(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder)


@torch.no_grad()
def logits(model):
    return model.eval()(**batch("bert")).logits


def test_quantized_inputs_let_gradients_through(quantized):
    model = load(quantized / "inputs").train()
    model(**batch("bert")).logits.square().sum().backward()
    for name in ("attention.self.query", "intermediate.dense", "output.dense"):
        assert model.get_parameter(f"bert.encoder.layer.0.{name}.weight").grad.abs().sum() > 0, name


def test_a_trainer_that_only_evaluates_saves_the_model_as_it_was(quantized, tmp_path):
    expected = logits(load(quantized / "inputs"))
    make_trainer("bert", tmp_path / "run", [], model=load(quantized / "inputs")).save_model(str(tmp_path / "again"))
    assert torch.equal(logits(load(tmp_path / "again")), expected)
    files = [folder / "model.safetensors" for folder in (quantized / "inputs", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_refused_method_leaves_a_packed_model_packed(quantized, tmp_path):
    model = load(quantized / "inputs")
    with pytest.raises(ValueError, match="nothing"):
        make_trainer("bert", tmp_path / "run", [SmolConfig(target_modules=["nothing"])], model=model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    state = set(model.state_dict())
    with pytest.raises(ValueError, match="quantized already"):
        make_trainer("bert", tmp_path / "run", [SmolConfig(target_bits=4, activations=True)], model=model)
    assert set(model.state_dict()) == state


def test_checkpoints_of_a_model_with_quantized_inputs_are_no_models(quantized, tmp_path):
    trainer = make_trainer(
        "bert", tmp_path, [], model=load(quantized / "inputs"), max_steps=2, save_strategy="steps", save_steps=1
    )
    trainer.train()
    with pytest.raises(ValueError, match="unfinished training"):
        load(tmp_path / "checkpoint-1")
    trainer.save_model(str(tmp_path / "done"))
    assert torch.equal(logits(load(tmp_path / "done")), logits(trainer.model))


@pytest.mark.parametrize("config", [HEADS, LAYERS, SharingConfig()], ids=["heads", "layers", "sharing"])
def test_what_changes_the_weights_there_are_refuses_quantized_models(quantized, tmp_path, config):
    model = load(quantized / "weights")
    before = weights(model)
    with pytest.raises(ValueError, match="quantize again afterwards"):
        make_trainer("bert", tmp_path, [config], model=model)
    assert_same_weights(weights(model), before)
    assert model.hf_quantizer.grids


@pytest.mark.parametrize(
    "configs",
    [
        [SMOL, LAYERS],
        [UniformQuantizationConfig(bits=4), HEADS],
        [MagnitudePruningConfig(target_modules=["query"]), HEADS],
    ],
    ids=["smol-layers", "uniform-heads", "magnitude-heads"],
)
def test_methods_that_do_not_go_together_are_taken_off_again(tmp_path, configs):
    model = build("bert")
    before = weights(model)
    with pytest.raises(ValueError, match=r"in another run|another method works on it"):
        make_trainer("bert", tmp_path, configs, model=model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_again_after_the_end_leaves_the_methods_alone(tmp_path):
    trainer = make_trainer("bert", tmp_path, [SMOL], max_steps=4)
    trainer.train()
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(logits(load(tmp_path / "model")), logits(trainer.model))


def test_rounding_what_was_trained_freely_is_said(quantized, tmp_path, caplog):
    trainer = make_trainer("bert", tmp_path, [], model=load(quantized / "weights"), max_steps=4)
    with caplog.at_level(logging.WARNING, "hf_approx.trainer"):
        trainer.train()
    assert "left their grid in training" in caplog.text
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(logits(load(tmp_path / "model")), logits(trainer.model))


def test_packing_one_more_weight_keeps_the_others_packed(quantized, tmp_path):
    model = load(quantized / "weights")
    expected = (quantized / "weights" / "model.safetensors").stat().st_size
    attach_packing(model, ["bert.encoder.layer.0.output.dense.weight"])
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == expected
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_two_smols_in_a_run_have_noise_of_their_own(tmp_path):
    configs = [SmolConfig(target_modules=[name], group_size=16) for name in ("query", "key")]
    trainer = make_trainer("bert", tmp_path, configs)
    indices = [index for method in trainer.methods for noise in method.noises for index in noise.indices]
    assert len(set(indices)) == len(indices)


def test_the_first_positional_argument_is_the_target():
    assert SparsificationConfig(0.8).target_sparsity == 0.8
    assert SmolConfig(3).target_bits == 3
    with pytest.raises(TypeError):
        SparsificationConfig(0.8, *[None] * 30)


@pytest.mark.parametrize("configs", [[SharingConfig(), LAYERS], [LAYERS, SharingConfig()]])
def test_layers_are_not_removed_from_banks(tmp_path, configs):
    model = build("bert")
    with pytest.raises(ValueError, match="share weights in another run"):
        make_trainer("bert", tmp_path, configs, model=model)
    assert not any("hf_approx_banks" in name for name in model.state_dict())


def test_templates_have_no_inputs_to_quantize(tmp_path):
    templates = SmolConfig(target_modules=r".*hf_approx_banks\..*", group_size=16, activations=True)
    with pytest.raises(ValueError, match="no numbers as input"):
        make_trainer("bert", tmp_path, [SharingConfig(), templates])


def test_folding_keeps_other_weights_quantized(tmp_path):
    attention, rest = r".*self\.(query|key|value)", r".*(intermediate|output)\.dense"
    configs = [
        SharingConfig(target_modules=attention, templates=2),
        SmolConfig(target_bits=3, target_modules=rest, group_size=16),
    ]
    trainer = make_trainer("bert", tmp_path, configs, max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "shared"))
    model = load(tmp_path / "shared")
    weight = model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight").clone()
    fold(model, layers=1)
    assert torch.equal(model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight"), weight)
    model.save_pretrained(tmp_path / "folded")
    assert (tmp_path / "folded" / "model.safetensors").stat().st_size < (
        tmp_path / "shared" / "model.safetensors"
    ).stat().st_size
    assert torch.equal(logits(load(tmp_path / "folded")), logits(model))


def test_templates_that_are_worked_on_are_not_folded(tmp_path):
    templates = SparsificationConfig(0.5, target_modules=r".*hf_approx_banks\..*")
    trainer = make_trainer("bert", tmp_path, [SharingConfig(templates=2), templates])
    with pytest.raises(ValueError, match=r"fold: (sparsification|sharing) is still at work on"):
        fold(trainer.model, layers=1)
