"""Training quantized models on: precisions stay, weights and scales learn."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers import assert_resumes_after_crash, assert_same_weights, make_trainer, stacked, weights
from hf_approx import FixedPrecisionConfig, SmolConfig, SparsificationConfig
from hf_approx.packing.grid import expand, round_to_grid


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Half of the weights of a BERT removed, the others at the precisions that noise alone has taught."""
    folder = tmp_path_factory.mktemp("quantized")
    approx = [SparsificationConfig(target_sparsity=0.5), SmolConfig(target_bits=3, noise_fraction=1.0)]
    trainer = make_trainer("bert", folder / "first", approx, max_steps=6)
    trainer.train()
    trainer.save_model(folder / "model")
    return folder / "model"


def load(folder, dtype=torch.float32):
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("train_scale", [True, False])
def test_the_second_phase_is_a_run_of_its_own(quantized, tmp_path, train_scale):
    model = load(quantized)
    before = {name: grid.bits for name, grid in model.hf_quantizer.grids.items()}
    scales = {name: grid.scale for name, grid in model.hf_quantizer.grids.items()}
    old = {name: param.detach().clone() for name, param in model.named_parameters()}
    config = FixedPrecisionConfig(train_scale=train_scale, scale_lr=1e-2)
    trainer = make_trainer("bert", tmp_path, config, model, max_steps=20, learning_rate=1e-2)
    trainer.train()
    grids, params = trainer.methods[0].grids, dict(trainer.model.named_parameters())
    assert grids.keys() == before.keys()
    for name, grid in grids.items():
        # A part may have become all zero; none has gained or lost bits otherwise.
        assert torch.equal(grid.bits, before[name].masked_fill(grid.bits == 0, 0))
        assert torch.equal(round_to_grid(params[name], grid), params[name])
        assert not params[name][old[name] == 0].any()
        assert not torch.equal(params[name], old[name])
        assert torch.equal(grid.scale, scales[name]) is not train_scale
    kept = {name: (param != 0).sum() for name, param in params.items() if name in grids}
    spent = sum((expand(grids[n].bits, params[n].shape) * (params[n] != 0)).sum() for n in grids)
    assert trainer.approx_report["totals"]["bits"] == pytest.approx(float(spent / sum(kept.values())))
    trainer.save_model(tmp_path / "again")
    assert_same_weights(weights(load(tmp_path / "again")), weights(trainer.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_starts_at_the_loaded_function(quantized, tmp_path, dtype):
    """Scales that were learned for float32 are kept, also where bfloat16 cannot hold them."""
    model = load(quantized, dtype)
    plain = load(quantized, dtype)
    make_trainer("bert", tmp_path, FixedPrecisionConfig(), model)
    tokens = torch.arange(5, 13).reshape(2, 4)
    assert torch.equal(model.eval()(tokens).logits, plain.eval()(tokens).logits)


def test_the_base_of_a_model_with_a_head_can_be_trained_alone(quantized):
    model = load(quantized)
    _, method = stacked(model.base_model, FixedPrecisionConfig())
    assert {f"bert.{name}.weight" for name in method.modules} == model.hf_quantizer.grids.keys()


def test_a_crash_in_the_second_phase_resumes(quantized, tmp_path):
    def trainer(folder):
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
        return make_trainer("bert", folder, FixedPrecisionConfig(), load(quantized), **options)

    assert_resumes_after_crash(trainer, tmp_path, 3)


def test_what_cannot_be_trained_is_refused(quantized, tmp_path):
    with pytest.raises(ValueError, match="has no quantized weight to train"):
        make_trainer("bert", tmp_path, FixedPrecisionConfig())
    with pytest.raises(ValueError, match="has no quantized weight to train"):
        make_trainer("bert", tmp_path, FixedPrecisionConfig(target_modules=["classifier"]), load(quantized))
    with pytest.raises(ValueError, match="scale_lr must be"):
        FixedPrecisionConfig(scale_lr=-1.0)
