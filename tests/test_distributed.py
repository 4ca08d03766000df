"""Two real processes: the same model as one process on the same global batch."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers import ROOT, assert_same_weights, launch, weights
from scripts import avagrad_fsdp, calibrate_ddp

SCRIPTS = ROOT / "tests" / "scripts"


def train(folder, processes, *options):
    launch(SCRIPTS / "train_ddp.py", folder, processes, *options, processes=processes)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    train(folder, 2)
    return folder


def test_both_processes_end_with_the_same_model_and_save_it(two_processes):
    ranks = [torch.load(two_processes / f"rank{i}.pt") for i in range(2)]
    assert_same_weights(*ranks)
    reports = [json.loads((two_processes / f"rank{i}.json").read_text()) for i in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["totals"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    loaded = AutoModelForSequenceClassification.from_pretrained(two_processes / "model")
    assert_same_weights(weights(loaded), ranks[0])


def test_two_processes_equal_one(two_processes, tmp_path):
    train(tmp_path, 1)
    one, two = torch.load(tmp_path / "rank0.pt"), torch.load(two_processes / "rank0.pt")
    for name in one:
        assert torch.equal(one[name] == 0, two[name] == 0), name
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_resume_to_the_same_file(two_processes):
    before = (two_processes / "model" / "model.safetensors").read_bytes()
    train(two_processes, 2, "resume")
    assert (two_processes / "model" / "model.safetensors").read_bytes() == before


def test_a_run_that_lost_a_process_ends_and_is_resumed_to_the_same_file(two_processes, tmp_path):
    ended = launch(SCRIPTS / "train_ddp.py", tmp_path, 2, "kill", processes=2, check=False, launcher=True)
    assert ended.returncode != 0
    assert "SIGKILL" in ended.stderr
    assert not (tmp_path / "model").exists()
    # As if it had died while it wrote the next one.
    half = tmp_path / "run" / "checkpoint-6"
    shutil.copytree(tmp_path / "run" / "checkpoint-4", half)
    (half / "trainer_state.json").unlink()
    (half / "model.safetensors").write_bytes(b"")
    train(tmp_path, 2, "resume_last")
    file = "model/model.safetensors"
    assert (tmp_path / file).read_bytes() == (two_processes / file).read_bytes()


def test_both_processes_remove_the_same_layer(tmp_path):
    train(tmp_path, 2, "layer")
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    assert_same_weights(*ranks)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert loaded.config.num_hidden_layers == len(loaded.bert.encoder.layer) == 1
    assert_same_weights(weights(loaded), ranks[0])


def test_both_processes_end_with_the_same_precisions(tmp_path):
    train(tmp_path, 2, "smol")
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    assert_same_weights(*ranks)
    reports = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["totals"]["bits"] == pytest.approx(3.0, abs=0.02)


def test_a_warning_of_a_method_is_given_once():
    ended = launch(SCRIPTS / "warn_ddp.py", processes=2)
    assert ended.stderr.count("bits instead of 2.5; choose a finer granularity") == 1


def test_avagrad_on_sharded_parameters_equals_one_process(tmp_path):
    launch(SCRIPTS / "avagrad_fsdp.py", tmp_path / "sharded.pt", processes=2)
    model = avagrad_fsdp.build()
    avagrad_fsdp.train(model)
    sharded = torch.load(tmp_path / "sharded.pt")
    for name, param in model.named_parameters():
        torch.testing.assert_close(sharded[name], param.detach(), rtol=1e-10, atol=1e-12)


def test_what_calibration_measures_does_not_depend_on_the_number_of_processes(tmp_path):
    launch(SCRIPTS / "calibrate_ddp.py", tmp_path, processes=2)
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    for kind in calibrate_ddp.KINDS:
        one, first, second = calibrate_ddp.measure(kind, 1), *(rank[kind] for rank in ranks)
        assert_same_weights(first["model"], second["model"])
        for way in ("rounded", "calibrated"):
            assert first[way] == second[way], (kind, way)
            assert first[way]["loss"] == pytest.approx(one[way]["loss"], rel=1e-9), (kind, way)
            assert first[way]["agreement"] == one[way]["agreement"], (kind, way)
