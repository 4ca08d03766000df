"""Going on from a checkpoint ends exactly where the run that was never broken ends, or is refused."""

import json
import resource
import shutil

import pytest
import torch
from transformers import TrainerCallback

from helpers import assert_same_weights, make_trainer, weights
from hf_approx import (
    AvaGradConfig,
    MagnitudePruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
)

CS = SparsificationConfig(target_sparsity=0.8)


class Steps(TrainerCallback):
    """Counts the steps of a training."""

    def __init__(self):
        self.count = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.count += 1


class Interrupt(TrainerCallback):
    def __init__(self, step, error=KeyboardInterrupt):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise self.error


@pytest.mark.parametrize(
    ("approx", "options"),
    [
        (CS, {"max_steps": 6}),
        ((), {"max_steps": 5, "optimizer": AvaGradConfig(lr=0.01)}),
        (SharingConfig(), {"max_steps": -1, "num_train_epochs": 1.5}),
        (SmolConfig(target_bits=3), {"max_steps": 3, "gradient_accumulation_steps": 2}),
        (MagnitudePruningConfig(), {"max_steps": 6, "ignore_data_skip": True}),
        (CS, {"max_steps": -1, "num_train_epochs": 2}),
    ],
    ids=["steps", "plain", "half an epoch", "accumulated", "no skip", "epochs"],
)
def test_a_run_that_was_killed_after_its_last_checkpoint_takes_no_further_step(tmp_path, approx, options):
    """An epoch is four steps. The rate is constant: at zero a step too many would change nothing."""

    def trainer():
        return make_trainer(
            "bert", tmp_path, approx, save_strategy="steps", save_steps=1, lr_scheduler_type="constant", **options
        )

    straight = trainer()
    straight.train()
    resumed, steps = trainer(), Steps()
    resumed.add_callback(steps)
    resumed.train(resume_from_checkpoint=True)
    assert steps.count == 0
    assert resumed.state.global_step == straight.state.global_step == straight.state.max_steps
    assert_same_weights(weights(resumed.model), weights(straight.model))
    assert resumed.approx_report == straight.approx_report


def test_a_stream_takes_no_further_step(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from make_trainer("bert", tmp_path).train_dataset

    def trainer():
        made = make_trainer("bert", tmp_path, CS, max_steps=3, save_strategy="steps", save_steps=1)
        made.train_dataset = Stream()
        made.args.lr_scheduler_type = "constant"
        return made

    straight = trainer()
    straight.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(straight.model))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints, and one whose checkpoints hold the model alone."""
    folder = tmp_path_factory.mktemp("run")
    make_trainer("bert", folder / "whole", CS, max_steps=4, save_strategy="steps", save_steps=2).train()
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer("bert", folder / "alone", CS, max_steps=2, **options).train()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    shutil.copytree(run / "whole", tmp_path / "run")
    return tmp_path / "run" / "checkpoint-4"


FILES = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "approx_state.json", "model.safetensors"]


def refused(folder, message, approx=CS, **options):
    trainer = make_trainer("bert", folder, approx, max_steps=6, **options)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message) as error:
        trainer.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert_same_weights(weights(trainer.model), before)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_cut_off_or_of_another_step_is_refused(checkpoint, name):
    path = checkpoint / name
    whole = path.read_bytes()
    path.unlink()
    refused(checkpoint.parent, f"Cannot resume: '.*checkpoint-4/{name}' is missing")
    path.write_bytes(whole[: len(whole) // 2])
    refused(checkpoint.parent, f"Cannot resume: '.*checkpoint-4/{name}' is damaged")
    path.write_bytes(b"")
    refused(checkpoint.parent, f"Cannot resume: '.*checkpoint-4/{name}' is damaged")
    shutil.copy(checkpoint.with_name("checkpoint-2") / name, path)
    wanted = "is of step 2" if name == "approx_state.json" else "is not the file that was written"
    refused(checkpoint.parent, f"Cannot resume: '.*checkpoint-4/{name}' {wanted}")
    path.write_bytes(whole)
    make_trainer("bert", checkpoint.parent, CS, max_steps=4).train(resume_from_checkpoint=True)


def test_the_state_of_another_step_is_refused(checkpoint):
    shutil.copy(checkpoint.with_name("checkpoint-2") / "trainer_state.json", checkpoint)
    refused(checkpoint.parent, r"checkpoint-4/trainer_state.json' is of step 2, and the rest .* of step 4")


def test_a_checkpoint_of_the_model_alone_is_refused_as_that(run):
    refused(run / "alone", "holds the model alone, as save_only_model=True makes them")


def test_files_of_other_processes_or_of_fp16_are_refused(checkpoint):
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    refused(checkpoint.parent, r"rng_state.pth' is missing.*has those of 2 others")
    (checkpoint / "rng_state_0.pth").rename(checkpoint / "rng_state.pth")
    trainer = make_trainer("bert", checkpoint.parent, CS, max_steps=6)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"scaler.pt' is missing"):
        trainer.train(resume_from_checkpoint=True)
    state = json.loads((checkpoint / "approx_state.json").read_text())
    torch.save(trainer.accelerator.scaler.state_dict(), checkpoint / "scaler.pt")
    state["files"]["scaler.pt"] = "written by that run"
    (checkpoint / "approx_state.json").write_text(json.dumps(state))
    refused(checkpoint.parent, "was trained with fp16, this run is not")


def test_a_checkpoint_of_an_earlier_version_is_resumed(checkpoint, run):
    """Which did not note its files."""
    path = checkpoint / "approx_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({name: state[name] for name in ("methods", "history")}))
    make_trainer("bert", checkpoint.parent, CS, max_steps=4).train(resume_from_checkpoint=True)
    (checkpoint / "scheduler.pt").unlink()
    refused(checkpoint.parent, r"scheduler.pt' is missing")


def test_a_run_without_methods_is_checked_too(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "optimizer": AvaGradConfig()}
    make_trainer("bert", tmp_path, **options).train()
    shutil.copy(tmp_path / "checkpoint-1" / "optimizer.pt", tmp_path / "checkpoint-2")
    refused(tmp_path, r"checkpoint-2/optimizer.pt' is not the file", (), optimizer=AvaGradConfig())


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_trainer_that_was_interrupted_goes_on_exactly(tmp_path, error):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    approx = [SparsificationConfig(target_sparsity=0.8, soft_fraction=0.5), SmolConfig(target_bits=4)]
    straight = make_trainer("bert", tmp_path / "a", approx, **options)
    straight.train()
    broken = make_trainer("bert", tmp_path / "b", approx, **options)
    broken.add_callback(Interrupt(3, error))
    with pytest.raises(error):
        broken.train()
    broken.train(resume_from_checkpoint=True)
    assert_same_weights(weights(broken.model), weights(straight.model))


def test_a_trainer_that_was_interrupted_trains_again(tmp_path):
    trainer = make_trainer("bert", tmp_path, CS, max_steps=3)
    trainer.add_callback(Interrupt(1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_named_and_the_last_one_stays(tmp_path):
    def make(folder):
        options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
        return make_trainer("bert", tmp_path / folder, CS, **options)

    straight = make("straight")
    straight.train()
    # torch writes it, after the weights.
    size = (tmp_path / "straight" / "checkpoint-2" / "optimizer.pt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, before[1]))

    full = make("full")
    full.add_callback(Full())
    try:
        with pytest.raises(OSError, match=r"A file in '.*checkpoint-2' could not be written to its end: .* are free"):
            full.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resumed = make("full")
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights(resumed.model), weights(straight.model))


def test_a_batch_that_did_not_fit_is_tried_again_smaller(tmp_path):
    trainer = make_trainer("bert", tmp_path, CS, max_steps=3, auto_find_batch_size=True)
    trainer.add_callback(Interrupt(1, torch.OutOfMemoryError("CUDA out of memory.")))
    trainer.train()
    assert trainer.state.train_batch_size < 8
    assert trainer.approx_report["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
