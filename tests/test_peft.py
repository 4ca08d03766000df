"""PEFT's adapters on compressed models, and models with adapters where whole ones are needed."""

import json
import logging

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from helpers import CrashAt, SimulatedCrashError, assert_same_weights, make_trainer, weights
from hf_approx import (
    ApproxConfig,
    AvaGradConfig,
    LayerDroppingConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach_packing,
)
from models import batch, build

LOADED = {
    "sparse": SparsificationConfig(target_sparsity=0.9),
    "sparse and quantized": [SparsificationConfig(target_sparsity=0.8), SmolConfig(target_bits=4)],
    "shared": SharingConfig(templates=0.5),
}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Folders of compressed models, by kind."""
    folders = {}
    for kind, approx in LOADED.items():
        folders[kind] = tmp_path_factory.mktemp("compressed")
        trainer = make_trainer("llama", folders[kind] / "run", approx=approx, max_steps=4)
        trainer.train()
        trainer.save_model(str(folders[kind] / "model"))
    return {kind: folder / "model" for kind, folder in folders.items()}


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def with_adapters(model, targets=("q_proj", "down_proj"), **options):
    """Adapters that are not zero from the start."""
    torch.manual_seed(1)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets), task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch("llama")).logits


def trainer_of(folder, base, **options):
    return make_trainer(
        "llama",
        folder,
        model=with_adapters(load(base), modules_to_save=["lm_head"]),
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        **options,
    )


@pytest.mark.parametrize("kind", LOADED)
@pytest.mark.parametrize("optimizer", [None, AvaGradConfig(lr=0.01)], ids=["adamw", "avagrad"])
def test_adapters_train_beside_a_base_that_stays_as_it_was(compressed, tmp_path, kind, optimizer):
    base = weights(load(compressed[kind]))
    trainer = trainer_of(tmp_path / "run", compressed[kind], optimizer=optimizer)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "lora_" in name or "modules_to_save" in name}
    trainer.save_model(str(tmp_path / "adapters"))
    assert not (tmp_path / "adapters" / "config.json").exists()
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert torch.equal(logits(loaded), logits(trainer.model))
    after = weights(trainer.model.unload())
    assert not torch.equal(after.pop("lm_head.weight"), base.pop("lm_head.weight"))  # it is saved with the adapters
    assert_same_weights(after, base)


def test_a_run_with_adapters_resumes_exactly(compressed, tmp_path):
    straight = trainer_of(tmp_path / "a", compressed["sparse"])
    straight.train()
    crashed = trainer_of(tmp_path / "b", compressed["sparse"])
    crashed.add_callback(CrashAt(3))
    with pytest.raises(SimulatedCrashError):
        crashed.train()
    resumed = trainer_of(tmp_path / "b", compressed["sparse"])
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(straight.model))


def test_merged_weights_are_stored_as_they_are_which_saving_says_once(compressed, tmp_path, caplog):
    model = with_adapters(load(compressed["sparse and quantized"]))
    expected = logits(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "packed")
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "(and 3 others) is not the weight that was quantized" in warnings[0]
    torch.testing.assert_close(logits(load(tmp_path / "packed")), expected, rtol=0, atol=1e-2)  # in half precision
    merged.dequantize()
    merged.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    torch.testing.assert_close(logits(load(tmp_path / "dense")), expected)


def test_merging_into_shared_weights_is_warned_of(compressed, tmp_path, caplog):
    shared = load(compressed["shared"])
    make_trainer("llama", tmp_path, model=with_adapters(shared))
    assert "call model.dequantize() before adding adapters" in caplog.text
    plain = load(compressed["shared"])
    plain.dequantize()
    model = with_adapters(plain)
    expected = logits(model)
    caplog.clear()
    make_trainer("llama", tmp_path, model=model)
    assert not caplog.records
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)


def test_modules_to_save_are_layers_and_no_banks_that_are_named_like_them(compressed, tmp_path):
    """Of a layer that shares its weight the coefficients are trained; the templates are those of the model."""
    base = load(compressed["shared"])
    names = {name for name, _ in base.named_parameters()}
    model = with_adapters(base, ["q_proj"], modules_to_save=["down_proj"])
    own = [name for name, param in model.named_parameters() if param.requires_grad and "lora_" not in name]
    assert len(own) == 2
    assert all("down_proj.modules_to_save.default.parametrizations" in name for name in own)
    model(**batch("llama")).logits.square().mean().backward()
    with torch.no_grad():
        for name in own:
            param = model.get_parameter(name)
            assert param.grad.abs().sum() > 0
            param.mul_(2)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(load(compressed["shared"]), tmp_path / "adapters")
    assert torch.equal(logits(again), expected)
    unloaded = model.unload()
    assert {name for name, _ in unloaded.named_parameters()} == names
    assert not torch.equal(logits(unloaded), logits(load(compressed["shared"])))
    unloaded.save_pretrained(tmp_path / "unloaded")
    assert torch.equal(logits(load(tmp_path / "unloaded")), logits(unloaded))


def test_layers_that_stay_packed_take_no_adapters(compressed, tmp_path):
    model = load(compressed["sparse"], quantization_config=ApproxConfig(runtime="packed"))
    with pytest.raises(ValueError, match=r"SparseLinear.* is not supported"):
        with_adapters(model)
    with pytest.raises(ValueError, match="load the model with runtime='dense' to train it"):
        make_trainer("llama", tmp_path, model=with_adapters(model, ["embed_tokens"]))


def test_a_base_with_adapters_in_it_is_not_saved_under_names_that_load_wrong(compressed, tmp_path):
    model = with_adapters(load(compressed["sparse"]))
    with pytest.raises(ValueError, match=r"save those with PeftModel\.save_pretrained, and this model after unload"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    model.unload().save_pretrained(tmp_path / "base")
    saved = [(folder / "model.safetensors").read_bytes() for folder in (tmp_path / "base", compressed["sparse"])]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    "config",
    [
        SparsificationConfig(target_modules=["q_proj"]),
        SparsificationConfig(target_modules=r".*lora_A\.default"),
        SparsificationConfig(granularity="head"),
        SharingConfig(),
        LayerDroppingConfig(target_sparsity=0.5),
        UniformQuantizationConfig(bits=4, mode="qat"),
    ],
    ids=["weights", "adapters", "heads", "sharing", "layers", "quantization"],
)
@pytest.mark.parametrize("injected", [False, True], ids=["PeftModel", "base"])
def test_methods_refuse_a_model_with_adapters_and_leave_it(tmp_path, config, injected):
    model = with_adapters(build("llama"))
    model = model.get_base_model() if injected else model
    before = weights(model)
    with pytest.raises(ValueError, match="compress first and add adapters to the result, or compress what merge"):
        make_trainer("llama", tmp_path, model=model, approx=config)
    with pytest.raises(ValueError, match="has PEFT adapters"):
        attach_packing(model, [])
    assert_same_weights(weights(model), before)


def test_prompts_are_adapters_too(tmp_path):
    model = get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PeftModelForCausalLM has PEFT adapters"):
        make_trainer("llama", tmp_path, model=model, approx=SparsificationConfig(target_modules=["q_proj"]))


def test_a_merged_model_can_be_compressed(tmp_path):
    merged = with_adapters(build("llama")).merge_and_unload()
    trainer = make_trainer("llama", tmp_path, model=merged, approx=SparsificationConfig(target_sparsity=0.8))
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    trainer.save_model(str(tmp_path / "saved"))
    assert_same_weights(weights(load(tmp_path / "saved")), weights(merged))
    assert isinstance(with_adapters(merged), PeftModel)
