"""A training that diverged is stopped and named, and nothing of it is saved."""

import math

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from helpers import arguments, assert_same_weights, make_trainer, stacked, trained_weight, weights
from hf_approx import (
    ApproxTrainer,
    AvaGradConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach_packing,
    fold,
)
from hf_approx.cli import main
from hf_approx.finite import NotFiniteError, Suspect, first_not_finite
from hf_approx.loops import TicketConfig, TicketSearch, calibrate, pareto_front, round_weights
from hf_approx.loops.rounds import Ticket
from hf_approx.methods.budget import global_top_k, threshold
from hf_approx.methods.precision import steer
from models import build, dataset

CS = SparsificationConfig(target_sparsity=0.7)
KEY = "bert.encoder.layer.0.attention.self.query.weight"
METHODS = {
    "cs": CS,
    "2:4": SparsificationConfig(granularity="2:4", target_sparsity=0.5),
    "magnitude": MagnitudePruningConfig(target_sparsity=0.7, update_every=1),
    "movement": MovementPruningConfig(target_sparsity=0.7),
    "smol": SmolConfig(target_bits=3),
    "uniform": UniformQuantizationConfig(),
    "late": UniformQuantizationConfig(mode="round"),
    "sharing": SharingConfig(),
    "both": [CS, SmolConfig(target_bits=4, noise_fraction=0.8)],
    "none": (),
}


class Poisoned(ApproxTrainer):
    """Whose loss, and gradient with it, is no number in the forward passes that `poison` lists, from 1."""

    poison = ()
    passes = 0
    value = math.nan

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            return loss
        self.passes += 1
        return loss * self.value if self.passes in self.poison else loss


def poisoned(folder, approx=(), poison=(3,), value=math.nan, name="bert", **options):
    optimizer = options.pop("optimizer", None)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 4, **options}
    trainer = Poisoned(
        model=build(name),
        args=arguments(folder, **options),
        train_dataset=dataset(name),
        approx=approx,
        optimizer=optimizer,
    )
    trainer.poison, trainer.value = poison, value
    return trainer


@pytest.mark.parametrize("approx", METHODS.values(), ids=METHODS)
def test_a_diverged_run_stops_at_its_step_and_leaves_the_last_good_checkpoint(tmp_path, approx):
    trainer = poisoned(tmp_path, approx, optimizer=AvaGradConfig(lr=0.01))
    with pytest.raises(NotFiniteError, match="not finite at step 3") as error:
        trainer.train()
    assert "holds NaN" in str(error.value) or "hold NaN" in str(error.value)
    assert f"resume from '{tmp_path}/checkpoint-2'" in str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    for save in (trainer.finalize, lambda: trainer.save_model(str(tmp_path / "model")), trainer.push_to_hub):
        with pytest.raises(ValueError, match=r"diverged|train first"):
            save()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    trainer.poison = ()
    trainer.train(resume_from_checkpoint=True)
    straight = poisoned(tmp_path / "straight", approx, (), optimizer=AvaGradConfig(lr=0.01), save_strategy="no")
    straight.train()
    assert_same_weights(weights(trainer.model), weights(straight.model))


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (math.nan, {}),
        (math.inf, {"logging_nan_inf_filter": False}),
        (-math.inf, {"logging_strategy": "no"}),
    ],
)
def test_without_checkpoints_the_end_refuses(tmp_path, value, options):
    """The third of four steps has the bad loss in the second of its two passes."""
    trainer = poisoned(tmp_path, CS, (6,), value, save_strategy="no", gradient_accumulation_steps=2, **options)
    with pytest.raises(NotFiniteError, match=r"not finite at step 3; .* start again with a smaller learning rate"):
        trainer.train()
    assert not list(tmp_path.iterdir())


class Spoil(TrainerCallback):
    """Writes a value into something after a step."""

    def __init__(self, step, find, value):
        self.step, self.find, self.value = step, find, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                self.find(model).view(-1)[0] = self.value


def named(trainer, ending):
    """What is trained, or else a tensor of the model, and its name."""
    own = ((name, tensor) for name, tensor, _ in trainer.stack.learned())
    model = trainer.model
    return next(f for f in (*own, *model.named_parameters(), *model.named_buffers()) if f[0].endswith(ending))


@pytest.mark.parametrize(
    ("ending", "approx"),
    [
        ("classifier.bias", CS),
        ("query.weight", CS),
        ("scores", CS),
        ("scores", MovementPruningConfig()),
        ("limits", SmolConfig(target_bits=3)),
        ("log_scale", SmolConfig(target_bits=3)),
        ("log_limit", SmolConfig(target_bits=3, activations=True)),
        ("log_scale", UniformQuantizationConfig()),
        ("0.weight", SharingConfig()),
        ("query.weight", SharingConfig()),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_whatever_is_learned_is_looked_at(tmp_path, ending, approx, last):
    """Once spoiled in the middle, where the loss becomes NaN by itself, and once after the last step."""
    trainer = make_trainer("bert", tmp_path, approx, max_steps=4)
    name, tensor = named(trainer, ending)
    step = 4 if last else 2
    trainer.add_callback(Spoil(step, lambda model: tensor, math.nan))
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    if last:
        assert f"'{name}' holds NaN" in str(error.value)
    assert f"after step {step}" in str(error.value) or not last


def test_batch_statistics_are_looked_at_and_masks_of_attention_are_not(tmp_path):
    for ending, value in (("running_var", math.inf), ("running_mean", math.nan)):
        trainer = make_trainer("resnet", tmp_path, CS, max_steps=1)
        tensor = named(trainer, ending)[1]
        trainer.add_callback(Spoil(1, lambda model, tensor=tensor: tensor, value))
        with pytest.raises(NotFiniteError, match=rf"{ending}' holds {'infinity' if value == math.inf else 'NaN'}"):
            trainer.train()
    model = build("bert")
    model.register_buffer("causal", torch.full((3, 3), -math.inf))
    attach_packing(model, [KEY])
    model.causal[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="'causal' holds NaN"):
        attach_packing(model, [KEY])


def test_a_loss_that_harms_no_weight_is_only_told(tmp_path, caplog):
    """As of a batch without a single label."""

    class Unlabelled(Poisoned):
        def compute_loss(self, *args, **kwargs):
            loss = ApproxTrainer.compute_loss(self, *args, **kwargs)
            self.passes += 1
            return loss + math.nan if self.passes == 3 else loss

    trainer = Unlabelled(
        model=build("bert"), args=arguments(tmp_path, max_steps=5), train_dataset=dataset("bert"), approx=CS
    )
    trainer.train()
    told = [record.message for record in caplog.records if "not finite" in record.message]
    assert told == ["The loss or its gradient was not finite at step 3; all weights still are."]


def test_steps_that_a_scaler_skips_are_no_divergence(tmp_path, caplog):
    trainer = poisoned(tmp_path, CS, (1, 3), math.inf)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert "not finite" not in caplog.text
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_an_evaluation_that_is_no_number_stops_nothing(tmp_path):
    class Odd(ApproxTrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_loss": math.nan}

    trainer = Odd(
        model=build("bert"),
        args=arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1),
        train_dataset=dataset("bert"),
        eval_dataset=dataset("bert", 8),
        approx=CS,
    )
    trainer.train()
    assert first_not_finite(trainer.model) is None


def test_no_step_waits_for_the_device(tmp_path, monkeypatch):
    """Steps are noted by operations on the device alone; it is asked at logs, of which there is one here."""
    asked = []
    monkeypatch.setattr(Suspect, "step", lambda self, own=Suspect.step: asked.append(1) or own(self))
    make_trainer("bert", tmp_path, CS, max_steps=6, logging_steps=6).train()
    assert len(asked) == 3  # that log, and the ends of both epochs


@pytest.mark.parametrize("approx", [c for c in METHODS.values() if c and not isinstance(c, list)])
def test_methods_in_a_loop_of_ones_own_bake_nothing(approx):
    model = build("bert")
    stack, method = stacked(model, approx)
    stack.advance(0.0)
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    before = weights(model)
    with pytest.raises(NotFiniteError, match=f"{method.name}: 'classifier.bias' holds NaN"):
        stack.finalize()
    assert {n: t for n, t in before.items() if n != "classifier.bias"}.keys() <= weights(model).keys()
    with torch.no_grad():
        model.classifier.bias[0] = 0.0
    assert stack.finalize()
    assert first_not_finite(model) is None


def test_one_weight_that_is_nan_does_not_prune_the_others():
    model = build("bert")
    stack, method = stacked(model, MagnitudePruningConfig(target_sparsity=0.7, update_every=1))
    with torch.no_grad():
        trained_weight(model.bert.encoder.layer[0].attention.self.query)[0, 0] = math.nan
    for act in (lambda: stack.advance(0.5), stack.settle, lambda: method.end_round(0, 2)):
        with pytest.raises(NotFiniteError, match=f"magnitude: '{KEY}' holds NaN"):
            act()
    assert method.metrics()["sparsity"] == 0
    assert not method.is_final


def test_nothing_is_attached_to_weights_that_are_not_finite():
    for approx in [c for c in METHODS.values() if c and not isinstance(c, list)]:
        model = build("bert")
        with torch.no_grad():
            model.get_parameter(KEY)[0, 0] = math.inf
        names = list(weights(model))
        with pytest.raises(NotFiniteError, match=f"{approx.build().name}: '{KEY}' holds infinity"):
            stacked(model, approx)
        assert list(weights(model)) == names


def test_ranking_takes_nan_for_no_number():
    values = [torch.tensor([1.0, math.nan, 3.0]), torch.tensor([2.0])]
    with pytest.raises(NotFiniteError, match="ranked are NaN"):
        global_top_k(values, 1)
    assert math.isnan(threshold(values, 0.1))
    limits = torch.tensor([0.0, math.nan, 1.0])
    assert math.isnan(steer([limits], [torch.ones(1)], 3.0, 1, 8))
    assert limits.nan_to_num(-1.0).tolist() == [0.0, -1.0, 1.0]
    front = pareto_front([Ticket(0.5, 0.1, metric, [], []) for metric in (0.8, math.nan)])
    assert [ticket.metric for ticket in front] == [0.8]


def test_packing_saving_calibrating_rounding_and_folding_refuse(tmp_path):
    model = build("bert")
    attach_packing(model, [KEY])
    for value, told in ((math.nan, "NaN"), (-math.inf, "infinity")):
        with torch.no_grad():
            model.classifier.weight[0, 0] = value
        for act in (
            lambda: attach_packing(model, [KEY]),
            lambda: round_weights(model),
            lambda: calibrate(model, DataLoader(dataset("bert"), 8)),
            lambda: fold(model),
        ):
            before = weights(model)
            with pytest.raises(ValueError, match=rf"'classifier.weight' holds {told}|shares no weights"):
                act()
            assert all(torch.equal(t.nan_to_num(), before[n].nan_to_num()) for n, t in weights(model).items())


def test_a_packed_model_that_diverged_is_not_saved(tmp_path):
    model = build("bert")
    with torch.no_grad():
        model.get_parameter(KEY).mul_(torch.rand(32, 32) > 0.9)
    attach_packing(model, [KEY])
    model.save_pretrained(tmp_path / "good")
    with torch.no_grad():
        model.get_parameter(KEY).fill_(math.nan)
    with pytest.raises(NotFiniteError, match=f"save_pretrained: '{KEY}' holds NaN"):
        model.save_pretrained(tmp_path / "bad")
    assert not list(tmp_path.glob("bad/*"))


def test_the_command_line_refuses(tmp_path, capsys):
    model = build("bert")
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.mul_(torch.rand_like(param) > 0.9)
        model.classifier.bias[0] = math.nan
    model.save_pretrained(tmp_path / "dense")
    for options in ([], ["--bits", "4"]):
        with pytest.raises(SystemExit) as end:
            main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *options])
        assert end.value.code == 1
        assert "'classifier.bias' holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_calibration_whose_loss_is_no_number_leaves_the_model_as_it_was(monkeypatch):
    model, calls = build("bert"), []

    def loss(self, rows, wanted):
        calls.append(1)
        return ((rows - wanted) ** 2).mean() * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setattr("hf_approx.loops.distillation.Outputs.loss", loss)
    before = weights(model)
    with pytest.raises(NotFiniteError, match="the loss is nan at step 3 of 6"):
        calibrate(model, DataLoader([{"input_ids": e["input_ids"]} for e in dataset("bert")], 8), steps=6)
    assert_same_weights(weights(model), before)


def test_a_ticket_search_that_diverges_keeps_the_round_before(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    calls = []

    def loss(model, batch):
        calls.append(1)
        return model(batch[0]).square().mean() * (math.nan if len(calls) == 6 else 1)

    data = torch.utils.data.TensorDataset(torch.randn(16, 4))
    search = TicketSearch(
        model,
        TicketConfig(MagnitudePruningConfig(target_modules=["0", "2"]), rounds=2, epochs=1),
        DataLoader(data, 4),
        loss,
        lambda params: (torch.optim.SGD(params, lr=0.1), None),
        lambda model: 0.0,
        checkpoint=tmp_path,
    )
    with pytest.raises(NotFiniteError, match=r"Ticket search, round 2 of 2: '0.weight' and 3 other tensors hold NaN"):
        search.run()
    assert [path.name for path in tmp_path.iterdir()] == ["round-1"]


def test_names_counts_and_kinds():
    assert first_not_finite([("a", torch.tensor([1])), ("b", torch.tensor([]))]) is None
    assert first_not_finite([("a", torch.tensor(1.0)), ("b", torch.tensor(math.inf))]) == "'b' holds infinity"
    both = [(n, torch.tensor([math.nan], dtype=torch.bfloat16)) for n in "ab"]
    assert first_not_finite(both) == "'a' and 1 other tensors hold NaN"
    small = torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn)
    assert first_not_finite([("a", small)]) == "'a' holds NaN"
    assert first_not_finite([("a", torch.empty(2, device="meta"))]) is None
