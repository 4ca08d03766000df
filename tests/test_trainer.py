"""ApproxTrainer in the settings people train with: each must end with a sparse model and change nothing else."""

import json
import os
import signal

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from helpers import (
    CrashAt,
    SimulatedCrashError,
    arguments,
    assert_resumes_after_crash,
    assert_same_weights,
    make_trainer,
    python,
    weights,
)
from hf_approx import (
    ApproxSeq2SeqTrainer,
    ApproxTrainer,
    ApproxTrainerMixin,
    AvaGradConfig,
    MagnitudePruningConfig,
    PackedFormatError,
    SparsificationConfig,
)
from models import build, dataset

CS = SparsificationConfig(target_sparsity=0.8)


def no_dropout(name="bert"):
    model = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def train(tmp_path, name="bert", approx=CS, **options):
    trainer = make_trainer(name, tmp_path, approx=approx, model=no_dropout(name), **options)
    trainer.train()
    return trainer


def sparsity(trainer):
    return trainer.approx_report["totals"]["sparsity"]


def assert_close_weights(a, b, **tolerance):
    a, b = a.model.state_dict(), b.model.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)


def test_logs_name_sparsity_temperature_and_penalty(tmp_path):
    trainer = train(tmp_path, approx=SparsificationConfig(target_sparsity=None, preset="paper", penalty=1e-5))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    temperatures = [entry["sparsification/temperature"] for entry in logged]
    assert temperatures == sorted(temperatures)
    assert temperatures[0] < temperatures[-1]
    assert all(entry["sparsification/penalty"] > 0 for entry in logged[:1])
    assert {"sparsification/sparsity", "sparsification/soft_sparsity"} <= logged[0].keys()
    totals = trainer.approx_report["totals"]
    assert trainer.state.log_history[-1]["approx/packed_bytes"] == totals["packed_bytes"]


@pytest.mark.parametrize("average_tokens", [True, False])
def test_gradient_accumulation_equals_one_large_batch(tmp_path, average_tokens):
    """The penalty is added once a step, however many batches the step has."""
    plain = SparsificationConfig(target_sparsity=None, preset="paper", penalty=1e-2, mask_lr=1e-2, soft_fraction=1.0)

    def run(folder, **batching):
        trainer = make_trainer(
            "llama",
            folder,
            approx=plain,
            model=build("llama"),
            max_steps=4,
            weight_decay=0.0,
            optim="sgd",
            **batching,
        )
        trainer.model_accepts_loss_kwargs = average_tokens and trainer.model_accepts_loss_kwargs
        scores = []
        trainer.add_callback(Record(trainer.methods[0], scores))
        trainer.train()
        return scores

    whole = run(tmp_path / "a", per_device_train_batch_size=8)
    parts = run(tmp_path / "b", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert not torch.equal(whole[0], whole[-1])


class Record(TrainerCallback):
    """Keeps the gradients of the scores at every step: Adam's steps would hide a wrong scale."""

    def __init__(self, method, kept):
        self.method, self.kept = method, kept

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.kept.append(torch.cat([m.scores.grad.reshape(-1).clone() for m in self.method.masks]))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = train(tmp_path / "a")
    checkpointed = train(tmp_path / "b", gradient_checkpointing=True)
    assert_close_weights(plain, checkpointed, rtol=1e-5, atol=1e-6)


def test_compiled_training_equals_eager(tmp_path):
    eager = train(tmp_path / "a", max_steps=4)
    compiled = train(tmp_path / "b", max_steps=4, torch_compile=True, torch_compile_backend="aot_eager")
    assert_close_weights(eager, compiled, rtol=1e-4, atol=1e-5)
    compiled.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(weights(loaded), weights(compiled.model))


@pytest.mark.parametrize("optimizer", [None, AvaGradConfig(lr=0.01)], ids=["adamw", "avagrad"])
def test_bf16_autocast(tmp_path, optimizer):
    trainer = train(tmp_path, bf16=True, optimizer=optimizer)
    assert sparsity(trainer) == pytest.approx(0.8, abs=1e-3)
    assert trainer.model.dtype == torch.float32
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(weights(loaded), weights(trainer.model))


def test_the_best_model_is_one_with_the_final_mask(tmp_path):
    """With a metric that only gets worse, the best checkpoint would be the first, dense one."""
    worsening = iter(range(100, 0, -1))
    trainer = make_trainer(
        "bert",
        tmp_path,
        approx=CS,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        eval_dataset=dataset("bert", 8),
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda prediction: {"score": float(next(worsening))}
    trainer.train()
    # What is evaluated at a step has the mask of the step that comes.
    hardened = next(step for step in range(12) if step / 11 >= 0.75)
    assert trainer.state.best_global_step == hardened
    assert sparsity(trainer) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5"])
@pytest.mark.parametrize("crash", [3, 7], ids=["soft", "hard"])
@pytest.mark.parametrize(
    ("approx", "optimizer"),
    [(CS, AvaGradConfig(lr=0.01)), (MagnitudePruningConfig(target_sparsity=0.8, update_every=2), None)],
    ids=["cs", "magnitude"],
)
def test_a_crashed_run_resumes_to_the_same_weights(tmp_path, name, crash, approx, optimizer):
    """An epoch is four steps, so both crashes are in mid-epoch; dropout shows that random states are restored."""

    def trainer(folder):
        return make_trainer(
            name, folder, approx=approx, optimizer=optimizer, save_strategy="steps", save_steps=1, bf16=name == "bert"
        )

    assert_resumes_after_crash(trainer, tmp_path, crash)


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from helpers import make_trainer
from hf_approx import SparsificationConfig, AvaGradConfig

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

trainer = make_trainer("bert", sys.argv[1], approx=SparsificationConfig(target_sparsity=0.8),
                       optimizer=AvaGradConfig(lr=0.01), save_strategy="steps", save_steps=5)
if sys.argv[2] == "kill":
    trainer.add_callback(Kill())
trainer.train(resume_from_checkpoint=sys.argv[2] == "resume")
trainer.save_model(sys.argv[1] + "/final")
"""


def test_a_killed_process_resumes_to_the_same_file(tmp_path):
    killed = python(KILLED, tmp_path / "a", "kill", check=False)
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path / "a") == ["checkpoint-5"]
    python(KILLED, tmp_path / "a", "resume")
    python(KILLED, tmp_path / "b", "straight")
    files = [(tmp_path / run / "final" / "model.safetensors").read_bytes() for run in "ab"]
    assert files[0] == files[1]


def test_resuming_with_other_methods_is_refused(tmp_path):
    trainer = make_trainer("bert", tmp_path, approx=CS, save_strategy="steps", save_steps=2)
    trainer.add_callback(CrashAt(3))
    with pytest.raises(SimulatedCrashError):
        trainer.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    for approx in (
        MagnitudePruningConfig(target_sparsity=0.8),
        SparsificationConfig(target_sparsity=0.8, target_modules=["query"]),
        SparsificationConfig(target_sparsity=0.8, preset="paper"),
        (),
    ):
        with pytest.raises(ValueError, match="Cannot resume"):
            make_trainer("bert", tmp_path, approx=approx).train(resume_from_checkpoint=checkpoint)


def test_an_unfinished_checkpoint_never_loads_as_a_model(tmp_path):
    make_trainer("bert", tmp_path, approx=CS, max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(PackedFormatError, match="unfinished training"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)
    code = "import sys, transformers; transformers.AutoModel.from_pretrained(sys.argv[1]); print('loaded')"
    plain = python(code, checkpoint, check=False)
    assert plain.returncode != 0
    assert "loaded" not in plain.stdout


def test_training_on_after_the_end_keeps_the_zeros(tmp_path):
    trainer = train(tmp_path)
    layer = trainer.model.bert.encoder.layer[0].output.dense
    before = layer.weight.detach().clone()
    trainer.train()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight == 0, before == 0)


def test_seq2seq_trainer_generates(tmp_path):
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=4,
        report_to=[],
        use_cpu=True,
        predict_with_generate=True,
        generation_max_length=6,
        save_strategy="no",
    )
    data = dataset("t5", 16)
    trainer = ApproxSeq2SeqTrainer(model=build("t5"), args=args, train_dataset=data, eval_dataset=data[:4], approx=CS)
    trainer.train()
    assert trainer.predict(data[:4]).predictions.shape[0] == 4
    assert sparsity(trainer) == pytest.approx(0.8, abs=1e-3)


def test_avagrad_decay_reaches_weights_but_no_norm_bias_or_score(tmp_path):
    trainer = make_trainer("bert", tmp_path, approx=CS, optimizer=AvaGradConfig(weight_decay=0.01), weight_decay=0.0)
    optimizer = trainer.create_optimizer()
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    method = trainer.methods[0]
    targets = {target.name for target in method.targets.values()}
    named = dict(trainer.stack.named_parameters())
    assert named.keys() == dict(trainer.model.named_parameters()).keys() > targets
    for name, param in named.items():
        plain = name in targets or ("embeddings" in name and "LayerNorm" not in name)
        plain = plain or name in ("bert.pooler.dense.weight", "classifier.weight")
        assert decay.pop(id(param)) == (0.01 if plain else 0), name
    assert decay == {id(mask.scores): 0 for mask in method.masks}


def test_without_methods_it_is_an_ordinary_trainer(tmp_path):
    trainer = train(tmp_path, approx=())
    trainer.save_model(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert set(trainer.approx_report) <= {"about", "evaluation"}


def test_a_bad_method_leaves_the_model_as_it_was(tmp_path):
    model = build("bert")
    before = weights(model)
    bad = [SparsificationConfig(), MagnitudePruningConfig(target_modules=["query"])]
    with pytest.raises(ValueError, match="already sparsified"):
        ApproxTrainer(model=model, args=arguments(tmp_path), approx=bad)
    assert_same_weights(weights(model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approx": [{"method": "sparsification"}]}, "approx takes a method config, .* got {'method'"),
        ({"approx": "sparsification"}, "approx takes a method config, .* got 'sparsification'"),
        ({"approx": {"method": "smol"}}, "approx takes a method config, .* got {'method': 'smol'}"),
        ({"approx": SparsificationConfig}, "approx takes a method config, .* got <class .*SparsificationConfig"),
        ({"approx": CS.build()}, "approx takes a method config, .* got <.*ContinuousSparsification"),
        ({"optimizer": "avagrad"}, r"takes AvaGradConfig\(...\), .* TrainingArguments\(optim=...\) .* got 'avagrad'"),
        ({"optimizer": torch.optim.SGD}, r"optimizer takes AvaGradConfig\(...\), .* got <class .*SGD"),
        ({"approx": CS, "store_dtype": "int8"}, "not 'int8'"),
        ({"approx": CS, "model_init": lambda: build("bert"), "model": None}, "model_init would replace"),
        ({"model": "me/bert"}, r"model is the name 'me/bert'; load it first, with .*from_pretrained\('me/bert'\)"),
    ],
)
def test_impossible_arguments_are_refused(tmp_path, options, message):
    model = build("bert")
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        ApproxTrainer(**{"model": model, "args": arguments(tmp_path), **options})
    assert_same_weights(weights(model), before)


@pytest.mark.parametrize("base", [Trainer, Seq2SeqTrainer])
def test_a_mixin_that_comes_last_is_refused(base):
    with pytest.raises(TypeError, match=rf"^W: .* write class W\(ApproxTrainerMixin, {base.__name__}\)"):
        type("W", (base, ApproxTrainerMixin), {})


def test_an_optimizer_of_the_users_own_leaves_the_scores_to_adam(tmp_path):
    model = no_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = ApproxTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=dataset("bert"),
        approx=SparsificationConfig(target_sparsity=None),
        optimizers=(optimizer, scheduler),
    )
    before = trainer.methods[0].masks[0].scores.detach().clone()
    seen = []
    trainer.add_callback(Seen(lambda: seen.append(trainer.methods[0].masks[0].scores.detach() - before)))
    trainer.train()
    assert seen[2].abs().max() > 1e-3


class Seen(TrainerCallback):
    """Calls a function after every step."""

    def __init__(self, function):
        self.function = function

    def on_step_end(self, args, state, control, **kwargs):
        self.function()


def test_frozen_weights_can_be_pruned(tmp_path):
    model = no_dropout()
    for param in model.bert.encoder.layer[0].parameters():
        param.requires_grad_(False)
    trainer = make_trainer("bert", tmp_path, approx=CS, model=model)
    trainer.train()
    assert sparsity(trainer) == pytest.approx(0.8, abs=1e-3)


def test_a_value_too_large_for_half_precision_is_kept_in_its_own_dtype(tmp_path):
    model = no_dropout()
    model.classifier.bias.data[0] = 1e6
    trainer = make_trainer("bert", tmp_path, approx=CS, model=model, max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(weights(loaded), weights(trainer.model))
    assert loaded.classifier.bias[0] > 65504


def packed_model(tmp_path):
    train(tmp_path / "first").save_model(tmp_path / "packed")
    return AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("approx", [(), SparsificationConfig(target_sparsity=0.9)], ids=["finetune", "sparser"])
def test_training_a_loaded_model_resumes_exactly_and_saves_packed_again(tmp_path, approx):
    def trainer(folder):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
        return make_trainer("bert", folder, model=model, approx=approx, save_strategy="steps", save_steps=1)

    zeros = packed_model(tmp_path).bert.encoder.layer[0].output.dense.weight == 0
    straight = trainer(tmp_path / "straight")
    straight.train()
    crashed = trainer(tmp_path / "crashed")
    crashed.add_callback(CrashAt(4))
    with pytest.raises(SimulatedCrashError):
        crashed.train()
    resumed = trainer(tmp_path / "crashed")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(straight.model))
    after = resumed.model.bert.encoder.layer[0].output.dense.weight == 0
    assert torch.equal(after | zeros, after)
    resumed.save_model(tmp_path / "again")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert_same_weights(weights(loaded), weights(resumed.model))
    assert "quantization_config" in json.loads((tmp_path / "again" / "config.json").read_text())


def test_the_best_checkpoint_of_a_loaded_model_can_be_loaded(tmp_path):
    trainer = make_trainer(
        "bert",
        tmp_path / "run",
        model=packed_model(tmp_path),
        eval_dataset=dataset("bert", 8),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert sparsity(trainer) == pytest.approx(0.8, abs=1e-3)


def test_a_plain_trainer_says_how_to_resume_a_packed_model(tmp_path):
    def trainer():
        return Trainer(
            packed_model(tmp_path),
            arguments(tmp_path / "run", save_strategy="steps", save_steps=2),
            None,
            dataset("bert"),
        )

    trainer().train()
    with pytest.raises(ValueError, match=r"use ApproxTrainer, or call model\.dequantize"):
        trainer().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_was_not_written_to_its_end_is_never_taken(tmp_path):
    def trainer():
        return make_trainer("bert", tmp_path, SparsificationConfig(), max_steps=4, save_strategy="steps", save_steps=1)

    straight = trainer()
    straight.train()
    last = tmp_path / "checkpoint-3" / "trainer_state.json"
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    last.write_bytes(last.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"checkpoint-3' was not written to its end; resume from '.*checkpoint-2'"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"holds checkpoints and is none itself; pass .*checkpoint-2', the last"):
        trainer().train(resume_from_checkpoint=str(tmp_path))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(straight.model))
    assert json.loads(last.read_text())["global_step"] == 3
    for path in tmp_path.glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    with pytest.raises(ValueError, match="has no checkpoint that was written to its end"):
        trainer().train(resume_from_checkpoint=True)


def test_a_model_that_is_no_pretrained_model_ends_with_real_zeros(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])

        def forward(self, x, labels):
            logits = self.layers[1](self.layers[0](x).relu())
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.randn(4), "labels": i % 2} for i in range(32)]
    trainer = ApproxTrainer(
        model=Net(), args=arguments(tmp_path), train_dataset=data, approx=SparsificationConfig(target_sparsity=0.5)
    )
    trainer.train()
    zeros = sum(int((layer.weight == 0).sum()) for layer in trainer.model.layers)
    assert zeros == 12
    trainer.save_model(tmp_path / "saved")
