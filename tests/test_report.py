import json

import pytest
import torch
from torch import nn

from helpers import arguments, make_trainer, stacked
from hf_approx import MagnitudePruningConfig, SparsificationConfig, TicketConfig, TicketTrainer
from hf_approx.methods.base import HISTOGRAM_BINS
from hf_approx.report import Recorder, describe_layers, kind_of
from hf_approx.report_plots import has_history, plot_training
from models import build, dataset

PNG = b"\x89PNG\r\n\x1a\n"


def test_layers_and_kinds_count_the_zeros():
    params = {
        "m.layer.0.a.weight": torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        "m.layer.1.a.weight": torch.tensor([[2.0, 1.0], [0.0, 3.0]]),
        "m.layer.1.b.weight": torch.zeros(1, 2),
    }
    report = describe_layers(params, list(params))
    assert [layer["sparsity"] for layer in report["layers"]] == [0.75, 0.25, 1.0]
    assert report["kinds"] == {"a": {"weights": 8, "sparsity": 0.5}, "b": {"weights": 2, "sparsity": 1.0}}
    assert kind_of("m.layer.1.b.weight") == "b"


def test_the_histogram_is_that_of_the_masks():
    layer = nn.Sequential(nn.Linear(4, 3, bias=False))
    config = SparsificationConfig(preset="paper", target_sparsity=None, target_modules=["0"])
    _, method = stacked(layer, config)
    with torch.no_grad():
        method.masks[0].scores.copy_(torch.linspace(-6, 6, 12).reshape(3, 4))
    masks = torch.sigmoid(torch.linspace(-6, 6, 12))
    expected = [int(((masks >= i / 20) & (masks < (i + 1) / 20)).sum()) for i in range(20)]
    assert method.histogram() == expected
    assert len(expected) == HISTOGRAM_BINS
    assert sum(expected) == 12


def test_two_methods_of_a_kind_are_told_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    configs = [
        SparsificationConfig(target_modules=["0"], target_sparsity=0.5),
        SparsificationConfig(target_modules=["1"], target_sparsity=0.25),
    ]
    stack, *_ = stacked(model, *configs)
    stack.settle()
    recorder = Recorder(stack)
    metrics = recorder.record(3)
    assert metrics["sparsification-0/sparsity"] == 0.5
    assert metrics["sparsification-1/sparsity"] == 0.25
    assert recorder.history[0]["step"] == 3


def test_a_training_leaves_its_report_and_pictures(tmp_path):
    config = SparsificationConfig(target_sparsity=0.8)
    trainer = make_trainer("bert", tmp_path, approx=config, max_steps=8, logging_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "approx_report.json").read_text())
    assert report == json.loads(json.dumps(trainer.approx_report))
    (method,) = report["methods"]
    assert method["target_sparsity"] == 0.8
    assert method["learned_sparsity"] + method["last_correction"] == pytest.approx(method["sparsity"])
    total = sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    gone = sum(layer["shape"][0] * layer["shape"][1] * layer["sparsity"] for layer in report["layers"])
    assert gone / total == pytest.approx(report["totals"]["sparsity"])
    assert sum(kind["weights"] for kind in report["kinds"].values()) == total
    assert [entry["step"] for entry in report["history"]] == [2, 4, 6, 8]
    assert all(sum(entry["masks"]["sparsification"]) == total for entry in report["history"])
    # Hard masks are zero or one.
    assert report["history"][-1]["masks"]["sparsification"][1:-1] == [0] * (HISTOGRAM_BINS - 2)
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(PNG)
    assert (tmp_path / "out" / "layers.png").read_bytes().startswith(PNG)


def test_a_report_without_history_has_nothing_to_draw(tmp_path):
    assert not has_history({})
    with pytest.raises(ValueError, match="no logged sparsity"):
        plot_training({"methods": [], "history": []}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_methods_without_masks_are_drawn_too(tmp_path):
    trainer = make_trainer(
        "bert", tmp_path, approx=MagnitudePruningConfig(target_sparsity=0.5), max_steps=4, logging_steps=1
    )
    trainer.train()
    plot_training(trainer.approx_report, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_checkpoints_of_a_second_training_have_no_report(tmp_path):
    trainer = make_trainer("bert", tmp_path, MagnitudePruningConfig(0.5), max_steps=2)
    trainer.train()
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 1
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "model.safetensors").is_file()
    assert not {"README.md", "approx_report.json"} & {path.name for path in folder.iterdir()}


def test_a_reused_folder_keeps_nothing_of_the_earlier_model(tmp_path):
    trainer = make_trainer("bert", tmp_path, SparsificationConfig(target_sparsity=0.8), max_steps=4, logging_steps=2)
    trainer.train()
    trainer.save_model()
    (tmp_path / "similarity.png").write_bytes(PNG)
    assert (tmp_path / "layers.png").is_file()
    dense = make_trainer("bert", tmp_path, eval_dataset=dataset("bert", 8), max_steps=1)
    dense.train()
    dense.evaluate()
    dense.save_model()
    assert not list(tmp_path.glob("*.png"))
    report = json.loads((tmp_path / "approx_report.json").read_text())
    assert not {"methods", "totals"} & report.keys()
    assert report["evaluation"]["samples"] == 8
    card = (tmp_path / "README.md").read_text()
    assert "sparsification" not in card
    assert "8 examples" in card

    (tmp_path / "README.md").write_text("mine")
    unfinished = make_trainer("bert", tmp_path, MagnitudePruningConfig(0.5))
    unfinished.save_model()
    assert not (tmp_path / "approx_report.json").exists()
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_what_this_model_reached_on_its_own_evaluation_set_is_kept(tmp_path):
    def saved():
        trainer.save_model()
        return json.loads((tmp_path / "approx_report.json").read_text())["evaluation"]

    trainer = make_trainer("bert", tmp_path, MagnitudePruningConfig(0.5), eval_dataset=dataset("bert", 8), max_steps=2)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert saved() == {}
    loss = trainer.evaluate()["eval_loss"]
    trainer.evaluate(trainer.train_dataset)
    expected = {"metrics": {"loss": loss}, "samples": 8}
    assert saved() == expected
    assert saved() == expected
    with torch.no_grad():
        trainer.model.classifier.weight.mul_(2)
    assert saved() == {}
    trainer.evaluate(trainer.eval_dataset)
    assert saved()["samples"] == 8
    trainer.model.classifier.bias = nn.Parameter(torch.ones(2))
    assert saved() == {}


def test_a_search_reports_the_steps_of_all_its_trainings(tmp_path):
    def search():
        return TicketTrainer(
            model=build("bert"),
            args=arguments(tmp_path, max_steps=2, save_strategy="steps"),
            train_dataset=dataset("bert"),
            eval_dataset=dataset("bert", 8),
            search=TicketConfig(method=MagnitudePruningConfig(0.5), rounds=2, rewind_step=1),
        )

    for resume in (False, True):
        trainer = search()
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        report = json.loads((tmp_path / "approx_report.json").read_text())
        assert report["about"]["steps"] == 6
        assert report["evaluation"]["metrics"].keys() == {"loss"}
    assert {entry["round"] for entry in trainer.state.log_history} == {3}
