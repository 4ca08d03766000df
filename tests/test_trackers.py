"""What trackers are told."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from helpers import make_trainer
from hf_approx import SmolConfig, SparsificationConfig


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
