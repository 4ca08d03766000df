"""TicketTrainer: exact sparsity and rewinding, packed saving, exact resumption, and what it refuses."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from helpers import ROOT, arguments, assert_same_weights, launch, trained, weights
from hf_approx import (
    AvaGradConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SparsificationConfig,
    TicketConfig,
    TicketTrainer,
)
from models import batch, build, dataset
from scripts import ticket_ddp

IMP = MagnitudePruningConfig(target_sparsity=0.75)


def cs(**options):
    return SparsificationConfig(**{"preset": "paper", "soft_fraction": 1.0, "target_sparsity": 0.8, **options})


def make(folder, method=None, search=None, model=None, callbacks=None, trainer=None, **options):
    return TicketTrainer(
        model=model or build("bert"),
        args=arguments(folder, **{"max_steps": 4, "save_strategy": "steps", "logging_steps": 1, **options}),
        train_dataset=dataset("bert"),
        search=TicketConfig(method=method or cs(), **{"rounds": 2, "rewind_step": 2, **(search or {})}),
        callbacks=callbacks,
        **{"eval_dataset": dataset("bert", 16, seed=1), "compute_metrics": accuracy, **(trainer or {})},
    )


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


class Watch(TrainerCallback):
    """Keeps what is trained before chosen steps of the first training, and at every evaluation."""

    def __init__(self, step=None, crash=None):
        self.step, self.crash = step, crash
        self.trainings = 0
        self.at_step = None
        self.evaluated, self.ended = [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += 1

    def on_step_begin(self, args, state, control, model, **kwargs):
        if self.trainings == 1 and state.global_step == self.step:
            self.at_step = trained(model)
        if (self.trainings, state.global_step) == self.crash:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, model, **kwargs):
        self.ended.append(trained(model))

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.evaluated.append(trained(model))


def is_mask(name):
    return ".weight.0." in name


def test_the_ticket_is_sparse_packed_and_loads_back(tmp_path):
    trainer = make(tmp_path / "run")
    trainer.train()
    ticket, model = trainer.ticket, trainer.model
    assert len(ticket.names) == 12
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in ticket.names)
    total = sum(model.get_parameter(name).numel() for name in ticket.names)
    assert zeros == round(0.8 * total)
    assert ticket.sparsity == trainer.approx_report["totals"]["sparsity"] == zeros / total
    assert ticket.metric == -trainer.evaluate()["eval_loss"]

    trainer.save_model(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert set(loaded.config.quantization_config.tensors) == set(ticket.names)
    with torch.no_grad():
        assert torch.equal(loaded(**batch("bert")).logits, model.eval()(**batch("bert")).logits)


@pytest.mark.parametrize("method", [cs(), IMP], ids=["cs", "imp"])
@pytest.mark.parametrize(("search", "step"), [({}, 2), ({"rewind_step": None, "rewind_epoch": 1}, 3)])
def test_the_ticket_starts_from_the_exact_early_weights(tmp_path, method, search, step):
    """An epoch is three optimizer steps here, of two batches each but for the last."""
    watch = Watch(step)
    make(
        tmp_path,
        method,
        search,
        callbacks=[watch],
        max_steps=5,
        per_device_train_batch_size=7,
        gradient_accumulation_steps=2,
        save_strategy="no",
    ).train()
    assert not list(tmp_path.glob("round-*"))
    untrained = watch.evaluated[2]
    early = {name: tensor for name, tensor in watch.at_step.items() if not is_mask(name)}
    assert all(torch.equal(untrained[name], tensor) for name, tensor in early.items())
    assert not torch.equal(watch.evaluated[1]["classifier.weight"], untrained["classifier.weight"])


@pytest.mark.parametrize(
    ("method", "optimizer"), [(cs(), None), (IMP, None), (cs(target_sparsity=None), AvaGradConfig())]
)
def test_a_search_goes_on_after_a_crash_and_ends_the_same(tmp_path, method, optimizer):
    """With dropout and shuffling, so that every number drawn counts."""
    options = {"search": {"rounds": 3}, "trainer": {"optimizer": optimizer}, "max_steps": 3}
    straight = make(tmp_path / "a", method, **options)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "b", method, callbacks=[Watch(crash=(3, 1))], **options).train()
    assert [path.name for path in (tmp_path / "b").glob("round-*")] == ["round-2"]
    watch = Watch()
    resumed = make(tmp_path / "b", method, callbacks=[watch], **options)
    resumed.train(resume_from_checkpoint=True)
    assert watch.trainings == 2
    assert resumed.ticket == straight.ticket
    assert resumed.approx_report == straight.approx_report
    assert_same_weights(weights(resumed.model), weights(straight.model))


def test_weight_decay_does_not_touch_scores(tmp_path):
    watch = Watch(0)
    method = cs(target_sparsity=None, penalty=0.0, mask_lr=0.0, initial_score=0.3)
    make(tmp_path, method, callbacks=[watch], weight_decay=0.9, learning_rate=0.1).train()
    scores = {name for name in watch.at_step if name.endswith("scores")}
    assert len(scores) == 12
    assert all(torch.equal(watch.ended[0][name], watch.at_step[name]) for name in scores)


def test_every_training_is_logged_with_a_fresh_schedule(tmp_path):
    trainer = make(tmp_path, search={"rounds": 2}, max_steps=3)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert [entry["round"] for entry in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    rates = [entry["learning_rate"] for entry in steps]
    assert rates[:3] == rates[3:6] == rates[6:]
    assert rates[0] > rates[2]
    assert [entry["round"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2, 3, 3]
    temperatures = [entry["sparsification/temperature"] for entry in steps]
    assert temperatures[:6] == pytest.approx([200 ** (step / 3) for step in range(3)] * 2)


def test_the_metric_is_the_one_that_decides_which_model_is_best(tmp_path):
    trainer = make(tmp_path / "a", search={"rounds": 1}, metric_for_best_model="accuracy")
    trainer.train()
    assert trainer.ticket.metric == trainer.evaluate()["eval_accuracy"]
    trainer = make(tmp_path / "b", search={"rounds": 1}, metric_for_best_model="accuracy", greater_is_better=False)
    trainer.train()
    assert trainer.ticket.metric == -trainer.evaluate()["eval_accuracy"]
    with pytest.raises(ValueError, match="metric_for_best_model 'f1' is not among eval_loss"):
        make(tmp_path / "c", search={"rounds": 1}, metric_for_best_model="f1").train()


def test_bf16(tmp_path):
    trainer = make(tmp_path, bf16=True)
    trainer.train()
    assert trainer.ticket.sparsity == pytest.approx(0.8, abs=1e-4)
    assert trainer.model.dtype == torch.float32


def test_a_search_does_not_go_on_from_another(tmp_path):
    with pytest.raises(ValueError, match="no finished round"):
        make(tmp_path).train(resume_from_checkpoint=True)
    trainer = make(tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="another config"):
        make(tmp_path, cs(target_sparsity=0.7)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="searches once"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": {"epochs": 3}}, "leave out TicketConfig.epochs"),
        ({"trainer": {"approx": [cs()]}}, "leave out approx"),
        ({"trainer": {"eval_dataset": None}}, "give an eval_dataset"),
        ({"bf16_full_eval": True}, "must not round the weights"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500}, "no load_best_model_at_end"),
        ({"method": cs(target_modules=["nowhere"])}, "No module"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path, options, message):
    model = build("bert")
    with pytest.raises(ValueError, match=message):
        make(tmp_path, model=model, **options)
    assert_same_weights(weights(model), weights(build("bert")))


def test_one_optimizer_for_all_rounds_is_refused(tmp_path):
    model = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="a fresh optimizer"):
        make(tmp_path, model=model, trainer={"optimizers": (optimizer, None)})


def test_a_method_without_rounds_is_refused():
    with pytest.raises(ValueError, match="does not work in the rounds"):
        TicketConfig(method=MovementPruningConfig())


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"rewind_step": 4}, "rewind_step 4 lies beyond a round of 4 steps"),
        ({"rewind_step": None, "rewind_epoch": 1}, "rewind_epoch 1 lies beyond a round of 4 steps"),
    ],
)
def test_a_start_beyond_the_round_is_refused(tmp_path, search, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, search=search).train()


def test_frozen_weights_stay_and_the_rest_trains(tmp_path):
    model = build("bert")
    before = copy.deepcopy(model.state_dict())
    trainer = make(tmp_path, cs(train_weights=False, scale_mask=False), model=model, trainer={"store_dtype": None})
    trainer.train()
    after = model.state_dict()
    for name in trainer.ticket.names:
        kept = after[name] != 0
        assert torch.equal(after[name][kept], before[name][kept])
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_two_processes_equal_one_also_where_only_the_ticket_is_left_to_train(tmp_path):
    launch(ROOT / "tests" / "scripts" / "ticket_ddp.py", tmp_path, processes=2)
    one = weights(ticket_ddp.search(tmp_path / "one", 1).model)
    straight = torch.load(tmp_path / "straight-0.pt")
    for name in one:
        assert torch.equal(one[name] == 0, straight[name] == 0), name
        torch.testing.assert_close(one[name], straight[name], rtol=1e-4, atol=1e-6, msg=name)
    for other in ("straight-1", "resumed-0", "resumed-1"):
        assert_same_weights(torch.load(tmp_path / f"{other}.pt"), straight)
    # Methods go on from what the first process has, as the model does.
    assert_same_weights(*(torch.load(tmp_path / f"loop-{rank}.pt") for rank in (0, 1)))


class Spoil(TrainerCallback):
    """Makes a bias NaN after the first step of the second training."""

    trainings = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainings += 1

    def on_step_end(self, args, state, control, model, **kwargs):
        if (self.trainings, state.global_step) == (2, 1):
            model.classifier.bias.data[0] = float("nan")


def test_a_round_that_diverges_leaves_the_one_before(tmp_path):
    straight = make(tmp_path / "a")
    straight.train()
    with pytest.raises(ValueError, match=r"TicketTrainer: training diverged: .* first was not finite at step 2"):
        make(tmp_path / "b", callbacks=[Spoil()]).train()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["round-1"]
    resumed = make(tmp_path / "b")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(straight.model))
    state = tmp_path / "b" / "round-2" / "search.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"Cannot resume: '.*round-2/search.pt' is damaged"):
        make(tmp_path / "b").train(resume_from_checkpoint=True)
