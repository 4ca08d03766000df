"""What trackers are told."""

import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from helpers import make_trainer
from hf_approx import SmolConfig, SparsificationConfig
from hf_approx.loops import TicketConfig, TicketSearch, calibrate
from models import build, dataset


class Tracker(TrainerCallback):
    """Closes its run when training ends, as MLflow, Neptune, ClearML and Trackio do."""

    def __init__(self):
        self.told, self.closed = set(), False

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert not self.closed
        self.told |= set(logs)

    def on_train_end(self, args, state, control, **kwargs):
        self.closed = True


def test_tensorboard_gets_the_numbers_of_every_method(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    approx = [SparsificationConfig(target_sparsity=0.8, soft_fraction=0.5), SmolConfig(target_bits=4)]
    trainer = make_trainer("bert", tmp_path, approx=approx, report_to=["tensorboard"])
    tracker = Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    assert tracker.closed
    (events,) = (tmp_path / "board").iterdir()
    board = EventAccumulator(str(events)).Reload()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for method, metric in (("sparsification", "sparsity"), ("sparsification", "temperature"), ("smol", "bits")):
        scalars = board.Scalars(f"train/{method}/{metric}")
        assert [scalar.step for scalar in scalars] == [2, 4, 6, 8]
        values = [entry[f"{method}/{metric}"] for entry in logged]
        assert [scalar.value for scalar in scalars] == pytest.approx(values)
    for name, value in trainer.approx_report["totals"].items():
        (scalar,) = board.Scalars(f"train/approx/{name}")
        assert (scalar.step, scalar.value) == (8, pytest.approx(value))
        assert f"approx/{name}" in tracker.told
    assert board.Scalars("train/approx/sparsity")[0].value == pytest.approx(0.8, abs=1e-3)


@pytest.fixture
def accelerator(tmp_path):
    made = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    made.init_trackers("board")
    return made


def board_of(accelerator, folder):
    accelerator.end_training()
    return EventAccumulator(str(folder / "board")).Reload()


def test_trackers_of_accelerate_follow_a_calibration(accelerator, tmp_path):
    loader = DataLoader([{"input_ids": example["input_ids"]} for example in dataset("bert", 16)], 8)
    calibrate(build("bert"), loader, SmolConfig(target_bits=3), steps=4, accelerator=accelerator)
    board = board_of(accelerator, tmp_path)
    bits = [scalar.value for scalar in board.Scalars("calibration/bits")]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == pytest.approx(8, abs=0.1)
    assert [scalar.step for scalar in board.Scalars("calibration/loss")] == [0, 1, 2, 3]


def test_trackers_of_accelerate_follow_a_ticket_search(accelerator, tmp_path):
    torch.manual_seed(0)
    search = TicketSearch(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
        TicketConfig(
            method=SparsificationConfig(
                preset="paper", soft_fraction=1.0, target_sparsity=0.5, target_modules=["0", "2"]
            ),
            rounds=2,
            epochs=1,
        ),
        DataLoader([(torch.randn(8), i % 2) for i in range(16)], 8),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizers=lambda params: (torch.optim.SGD(params, lr=0.1), None),
        metric=lambda model: float(model[0].weight.abs().sum()),
        accelerator=accelerator,
    )
    ticket = search.run()
    board = board_of(accelerator, tmp_path)
    for name in ("sparsity", "metric", "loss"):
        scalars = board.Scalars(f"ticket/{name}")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx([entry[name] for entry in ticket.history])
