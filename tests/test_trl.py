"""TRL's trainers with the mixin: chats, texts and preferences, with and without PEFT."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import models
from helpers import assert_resumes_after_crash, assert_same_weights, weights
from hf_approx import ApproxTrainerMixin, AvaGradConfig, SharingConfig, SmolConfig, SparsificationConfig, attach
from language_modeling import byte_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
CHATS = [[("user", f"{i} + 1 ="), ("assistant", f"{i + 1}")] for i in range(16)]


class ApproxSFTTrainer(ApproxTrainerMixin, SFTTrainer):
    pass


class ApproxDPOTrainer(ApproxTrainerMixin, DPOTrainer):
    pass


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch):
    monkeypatch.setenv("CI", "1")


def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def llama():
    torch.manual_seed(0)
    return models.llama(len(tokenizer()))


def chats():
    turns = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    return Dataset.from_dict({"messages": turns})


def texts():
    return Dataset.from_dict({"text": [f"{i} plus one is {i + 1}." for i in range(16)]})


def options(folder, **given):
    common = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_length": 48,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 2,
        "disable_tqdm": True,
    }
    return {"output_dir": str(folder), **common, **given}


def sft(folder, approx=(), model=None, data=None, peft_config=None, optimizer=None, **given):
    return ApproxSFTTrainer(
        model=model or llama(),
        args=SFTConfig(**options(folder, **given)),
        train_dataset=chats() if data is None else data,
        processing_class=tokenizer(),
        approx=approx,
        peft_config=peft_config,
        optimizer=optimizer,
    )


def assert_reloads(trainer, folder):
    trainer.save_model(str(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert "quantization_config" in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("data", [chats, texts])
def test_supervised_fine_tuning_prunes_and_reloads(tmp_path, data):
    trainer = sft(tmp_path / "run", SparsificationConfig(target_sparsity=0.8), data=data(), bf16=True)
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {"sparsification/temperature", "mean_token_accuracy", "num_tokens"} <= logged.keys()
    assert_reloads(trainer, tmp_path / "saved")


def test_supervised_fine_tuning_quantizes_and_reloads(tmp_path):
    trainer = sft(tmp_path / "run", SmolConfig(target_bits=4), optimizer=AvaGradConfig(lr=0.1))
    trainer.train()
    assert trainer.approx_report["totals"]["bits"] == pytest.approx(4, abs=0.02)
    assert_reloads(trainer, tmp_path / "saved")


def test_the_penalty_counts_once_however_many_batches_a_step_has(tmp_path):
    """TRL divides its own loss by the tokens of all batches of a step."""
    plain = SparsificationConfig(target_sparsity=None, preset="paper", penalty=1e-2, soft_fraction=1.0)

    def scores(folder, **batching):
        trainer = sft(folder, plain, max_steps=2, optim="sgd", **batching)
        gradients = []
        method = trainer.methods[0]
        method.on_gradients = lambda scale: gradients.append([mask.scores.grad.clone() for mask in method.masks])
        trainer.train()
        return gradients

    whole = scores(tmp_path / "a", per_device_train_batch_size=8)
    parts = scores(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_crashed_run_resumes_and_only_the_finished_model_has_a_card(tmp_path):
    def trainer(folder):
        return sft(folder, SparsificationConfig(target_sparsity=0.8), save_strategy="steps", save_steps=1)

    straight = assert_resumes_after_crash(trainer, tmp_path, crash=3)
    card = tmp_path / "straight" / "README.md"
    assert not card.exists()
    with pytest.raises(ValueError, match=r"there is no model in .*straight yet; call save_model\(\) first"):
        straight.create_model_card()
    straight.save_model()
    straight.create_model_card(model_name="sums", dataset_name="me/additions")
    data = ModelCard.load(card).data
    assert (data.datasets, data.to_dict()["tags"]) == (["me/additions"], ["hf_approx", "sparsification", "trl", "sft"])


def dpo(folder, model, reference, approx=(), **given):
    data = Dataset.from_dict(
        {
            "prompt": [f"{i} + 1 = " for i in range(8)],
            "chosen": [str(i + 1) for i in range(8)],
            "rejected": [str(i) for i in range(8)],
        }
    )
    return ApproxDPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(**options(folder, **given)),
        train_dataset=data,
        processing_class=tokenizer(),
        approx=approx,
    )


def test_preference_training_compresses(tmp_path):
    trainer = dpo(tmp_path / "run", llama(), llama(), SparsificationConfig(target_sparsity=0.8))
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert_reloads(trainer, tmp_path / "saved")


@pytest.mark.parametrize("approx", [SparsificationConfig(), SmolConfig(), SharingConfig()])
def test_a_reference_that_follows_the_model_is_refused_while_it_is_compressed(tmp_path, approx):
    model = llama()
    before = weights(model)
    with pytest.raises(ValueError, match="train with it first and compress in another run"):
        dpo(tmp_path, model, llama(), approx, sync_ref_model=True)
    assert_same_weights(weights(model), before)


def test_a_reference_follows_a_compressed_model(tmp_path):
    shared = llama()
    attach(shared, SharingConfig(templates=0.5)).bake()
    with pytest.raises(ValueError, match=r"pass ref_model=copy\.deepcopy\(model\)"):
        dpo(tmp_path, shared, llama(), sync_ref_model=True)
    before = weights(shared)
    trainer = dpo(
        tmp_path,
        shared,
        copy.deepcopy(shared),
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        max_steps=2,
    )
    trainer.train()
    assert_same_weights(weights(trainer.ref_model), weights(shared))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights(shared).items())


def test_adapters_on_a_pruned_model(tmp_path):
    pruned = sft(tmp_path / "first", SparsificationConfig(target_sparsity=0.8), max_steps=4)
    pruned.train()
    pruned.save_model(str(tmp_path / "pruned"))
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = sft(tmp_path / "second", model=str(tmp_path / "pruned"), peft_config=adapters)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapters"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert_same_weights(weights(loaded.unload()), weights(pruned.model))


def test_compressing_and_adapters_in_one_run_are_refused_before_anything_is_done(tmp_path):
    model = llama()
    before = weights(model)
    with pytest.raises(ValueError, match="compress in a run without peft_config"):
        sft(tmp_path, SparsificationConfig(), model=model, peft_config=LoraConfig(target_modules=["q_proj"]))
    assert_same_weights(weights(model), before)
