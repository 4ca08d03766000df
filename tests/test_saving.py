"""`save_pretrained` of packed models: whole folders, and what is refused because nothing could load it."""

import copy
import json
import os
import pickle
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainerCallback
from transformers.utils import hub as transformers_hub

from helpers import arguments, make_trainer, stacked
from hf_approx import (
    LayerDroppingConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach_packing,
)
from hf_approx.cards import write_card
from hf_approx.layout import is_ours
from kills import CHANGES, killed_at_every_call, limited
from models import batch, build, dataset

CLASS = AutoModelForSequenceClassification


def pack(model, config=None):
    stack, _ = stacked(model, config or MagnitudePruningConfig(target_sparsity=0.9))
    stack.advance(1.0)
    attach_packing(model, stack.bake(), grids=stack.grids)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(**batch("bert")).logits


def loads_as(folder, models):
    """Which of the models a folder holds, exactly."""
    found = logits(CLASS.from_pretrained(folder))
    return next(name for name, expected in models.items() if torch.equal(found, expected))


@pytest.fixture(scope="module")
def two():
    """Two packed models, and what they compute."""
    models = {"old": pack(build("bert")), "new": pack(build("bert", seed=1), UniformQuantizationConfig(bits=4))}
    return models, {name: logits(model) for name, model in models.items()}


def old_model(models, folder, **options):
    shutil.rmtree(folder, ignore_errors=True)
    models["old"].save_pretrained(folder, **options)
    write_card(folder)
    (folder / "vocab.txt").write_text("mine")


def test_a_kill_at_any_call_of_save_pretrained_leaves_one_of_the_two_models(two, tmp_path):
    models, outputs = two
    folder = tmp_path / "model"
    seen = set()
    state = {}

    def prepare():
        old_model(models, folder, max_shard_size="10KB")
        state["card"] = (folder / "README.md").read_text()

    for call, _ in killed_at_every_call(prepare, lambda: models["new"].save_pretrained(folder)):
        card = (folder / "README.md").read_text() if (folder / "README.md").exists() else None
        found = (card is None and "new") or "old"
        if found not in seen or call % 7 == 0:
            assert loads_as(folder, outputs) == found, call
        seen.add(found)
        assert card in (None, state["card"])
        assert len(list(folder.glob("*.safetensors"))) == 1 or found == "old"
        assert (folder / "vocab.txt").read_text() == "mine"
    assert seen == {"old", "new"}
    assert os.listdir(tmp_path) == ["model"]


def test_a_full_disk_leaves_the_old_model(two, tmp_path):
    models, outputs = two
    folder = tmp_path / "model"
    old_model(models, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for size in (100, 3_000, 20_000):  # in the config, and in the weights
        assert limited(lambda: models["new"].save_pretrained(folder), resource.RLIMIT_FSIZE, size) != 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert os.listdir(tmp_path) == ["model"]
    assert loads_as(folder, outputs) == "old"


def test_arguments_of_save_pretrained_are_heard(two, tmp_path):
    models, outputs = two
    models["old"].save_pretrained(tmp_path / "a", is_main_process=False)
    assert list((tmp_path / "a").iterdir()) == []
    models["old"].save_pretrained(tmp_path / "a", max_shard_size="10KB", variant="small")
    assert len(list((tmp_path / "a").glob("model.small-*.safetensors"))) > 1
    assert torch.equal(logits(CLASS.from_pretrained(tmp_path / "a", variant="small")), outputs["old"])
    models["old"].save_pretrained(tmp_path / "a")  # beside it: the config is the same
    assert torch.equal(logits(CLASS.from_pretrained(tmp_path / "a", variant="small")), outputs["old"])
    assert loads_as(tmp_path / "a", outputs) == "old"
    models["new"].save_pretrained(str(tmp_path / "a"), True, None, False, "5GB")
    assert loads_as(tmp_path / "a", outputs) == "new"
    assert not list((tmp_path / "a").glob("model.small*"))
    with pytest.raises(ValueError, match="distributed_checkpoint"):
        models["old"].save_pretrained(tmp_path / "b", distributed_checkpoint=True)
    assert not (tmp_path / "b").exists()


def test_copies_pickles_and_subclasses_save_whole_folders_too(two, tmp_path, monkeypatch):
    models, outputs = two
    copied = copy.deepcopy(models["new"])
    with torch.no_grad():
        copied.classifier.bias.add_(1)
    outputs = {**outputs, "changed": logits(copied)}
    for name, model in (("changed", copied), ("new", pickle.loads(pickle.dumps(models["new"])))):
        old_model(models, tmp_path / "model")
        model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model" / "README.md").exists()
        assert loads_as(tmp_path / "model", outputs) == name

    class Mine(type(models["old"])):
        def save_pretrained(self, save_directory, **kwargs):
            super().save_pretrained(save_directory, **kwargs)
            with open(os.path.join(save_directory, "mine.txt"), "w") as file:
                file.write("more")

    monkeypatch.setattr(copied, "__class__", Mine)
    copied.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "mine.txt").read_text() == "more"


def test_a_dense_model_over_a_packed_one_takes_its_card_and_report_away(two, tmp_path):
    models, _ = two
    old_model(models, tmp_path / "model")
    (tmp_path / "model" / "approx_report.json").write_text("{}")
    dense = build("bert", seed=2).eval()
    dense.save_pretrained(tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "vocab.txt"}
    assert torch.equal(logits(CLASS.from_pretrained(tmp_path / "model")), logits(dense))
    (tmp_path / "model" / "README.md").write_text("of a dense model, which is none of our folders")
    dense.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").exists()


def test_pushing_while_saving_pushes_what_was_saved(two, tmp_path, monkeypatch):
    models, outputs = two
    pushed = {}

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        pushed[repo_id] = {
            name: load_file(os.path.join(working_dir, name))
            for name in os.listdir(working_dir)
            if name.endswith(".safetensors")
        }
        config = json.loads(Path(working_dir, "config.json").read_text())
        assert "hf_approx" in config["transformers_weights"]  # stops processes that have not imported it
        if repo_id == "me/refused":
            raise ConnectionError("no")

    class Api:
        def create_repo(self, repo_id, exist_ok, **kwargs):
            assert kwargs == {"private": True, "token": "hf_me"}
            return type("Url", (), {"repo_id": f"me/{repo_id.split('/')[-1]}"})

    class Card:
        def save(self, path):
            pass

    monkeypatch.setattr(transformers_hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: Card())
    hub = {"push_to_hub": True, "private": True, "token": "hf_me"}
    models["old"].save_pretrained(tmp_path / "model", **hub)
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert pushed["me/model"]["model.safetensors"].keys() == saved.keys()
    with pytest.raises(ConnectionError):
        models["new"].save_pretrained(tmp_path / "model", repo_id="me/refused", **hub)
    assert loads_as(tmp_path / "model", outputs) == "new"


def test_a_trainer_replaces_model_report_and_card_at_once(tmp_path, monkeypatch):
    """Checkpoints in the folder stay; a kill at any call leaves the card of the model it is beside."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take time
    folder = tmp_path / "run"
    config = SparsificationConfig(target_sparsity=0.5)
    trainer = make_trainer("bert", folder, config, max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.about["model_name"] = "First"
    trainer.save_model()
    first = (folder / "README.md").read_text()
    assert is_ours(folder / "README.md")
    first_weights = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.classifier.bias.add_(1)
    trainer.about["model_name"] = "Second"
    shutil.copytree(folder, tmp_path / "copy")

    def prepare():
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)

    results = set()
    for call, _ in killed_at_every_call(prepare, trainer.save_model, CHANGES):
        is_first = (folder / "model.safetensors").read_bytes() == first_weights
        assert ((folder / "README.md").read_text() == first) == is_first, call
        assert ("First" in (folder / "approx_report.json").read_text()) == is_first
        results.add(is_first)
    assert results == {True, False}
    trainer.save_model()
    assert (folder / "checkpoint-2" / "trainer_state.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "copy"}
    (folder / "README.md").write_text("by hand")
    trainer.save_model()
    assert (folder / "README.md").read_text() == "by hand"


METHODS = [
    SparsificationConfig(),
    SparsificationConfig(granularity="head", target_sparsity=0.5),
    LayerDroppingConfig(target_sparsity=0.5),
    MagnitudePruningConfig(),
    MovementPruningConfig(),
    SmolConfig(target_bits=4.0, activations=True),
    UniformQuantizationConfig(),
    SharingConfig(templates=0.5),
]


@pytest.mark.parametrize("config", METHODS, ids=lambda config: type(config).__name__)
def test_a_model_in_training_is_not_saved_as_one(tmp_path, config):
    model = build("bert")
    stack, _ = stacked(model, config)
    accelerator = Accelerator(cpu=True)
    for save in (
        model.save_pretrained,
        model.bert.save_pretrained,
        lambda folder: model.push_to_hub(str(folder)),
        lambda folder: model.save_pretrained(folder, push_to_hub=True),
        lambda folder: accelerator.save_model(model, folder),
    ):
        with pytest.raises(ValueError, match=r"at work on.*attach_packing"):
            save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    names = stack.bake()
    if isinstance(config, (SharingConfig, SmolConfig)):  # what a plain checkpoint cannot say
        with pytest.raises(ValueError, match="attach_packing"):
            model.save_pretrained(tmp_path / "model")
    attach_packing(model, names, grids=stack.grids)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(CLASS.from_pretrained(tmp_path / "model")), logits(model))
    model.bert.save_pretrained(tmp_path / "base")
    assert AutoModel.from_pretrained(tmp_path / "base") is not None
    if isinstance(config, (SharingConfig, SmolConfig)):  # accelerate writes no config, and names that no model has
        with pytest.raises(ValueError, match=r"save_model: .* call save_pretrained of the whole model"):
            accelerator.save_model(model, tmp_path / "accelerate")
        assert not (tmp_path / "accelerate").exists()


@pytest.mark.parametrize("config", METHODS, ids=lambda config: type(config).__name__)
def test_a_copy_of_a_model_in_training_is_saved_as_what_it_computes_or_not_at_all(tmp_path, config):
    model = build("bert").eval()
    stack, _ = stacked(model, config)
    stack.settle()
    copied = copy.deepcopy(model)
    if isinstance(config, (LayerDroppingConfig, SmolConfig)):  # what a plain checkpoint cannot say
        with pytest.raises(ValueError, match=r"(at work on|quantizes its input).*attach_packing"):
            copied.save_pretrained(tmp_path / "model")
        assert list(tmp_path.iterdir()) == []
        return
    copied.save_pretrained(tmp_path / "model")
    loaded = CLASS.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(build("bert")))


def test_the_part_that_no_method_works_on_is_saved(tmp_path):
    model = build("bert")
    stacked(model, SparsificationConfig(target_modules=["classifier"]))
    model.bert.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert all(torch.equal(t, model.bert.state_dict()[n]) for n, t in loaded.state_dict().items())


def test_a_model_around_the_one_that_a_method_works_on_is_refused(tmp_path):
    model = build("bert")
    stacked(model.bert, SparsificationConfig())
    with pytest.raises(ValueError, match=r"at work on 'bert\.encoder"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_plain_trainer_does_not_write_checkpoints_that_are_no_models(tmp_path):
    model = build("bert")
    stacked(model, SparsificationConfig())
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="ApproxTrainer"):
        Trainer(model=model, args=args, train_dataset=dataset("bert")).train()


def test_saving_in_the_middle_of_a_training_says_that_it_is_no_model(tmp_path, caplog):
    class Saves(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                trainer.save_model(str(tmp_path / "early"))

    config = SparsificationConfig(target_sparsity=0.5)
    trainer = make_trainer("bert", tmp_path / "run", config, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.add_callback(Saves())
    trainer.train()
    said = [record.message for record in caplog.records if "no model yet" in record.message]
    assert len(said) == 1
    assert json.loads((tmp_path / "early" / "config.json").read_text())["quantization_config"]["training"]
    with pytest.raises(ValueError, match="unfinished training"):
        CLASS.from_pretrained(tmp_path / "early")


def test_states_of_accelerate_load_into_the_same_method_alone(tmp_path):
    def prepared(config=None):
        torch.manual_seed(0)
        model = build("bert")
        stack, _ = stacked(model, config or SparsificationConfig(target_sparsity=0.5))
        accelerator = Accelerator(cpu=True)
        optimizer = stack.bind(torch.optim.Adam(stack.parameters(), lr=1e-3), steps=6)
        model, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(stack)
        return accelerator, model, stack, optimizer

    def step(number, model, stack, optimizer):
        model.train()
        torch.manual_seed(number)
        model(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    accelerator, *rest = prepared()
    for number in range(3):
        step(number, *rest)
    accelerator.save_state(str(tmp_path / "state"))
    for number in range(3, 6):
        step(number, *rest)
    again, *others = prepared()
    again.load_state(str(tmp_path / "state"))
    for number in range(3, 6):
        step(number, *others)
    straight, resumed = (parts[0].state_dict() for parts in (rest, others))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    straight, resumed = (parts[1].state_dict() for parts in (rest, others))
    assert straight["methods"] == resumed["methods"]
    assert all(torch.equal(tensor, resumed["tensors"][name]) for name, tensor in straight["tensors"].items())
    other, _, stack, _ = prepared(MovementPruningConfig())
    before = stack.state_dict()
    with pytest.raises(ValueError, match=r"does not fit these methods: '.*' is (missing|unknown)"):
        other.load_state(str(tmp_path / "state"))
    assert stack.state_dict()["methods"] == before["methods"]
    plain = Accelerator(cpu=True)
    plain.prepare(build("bert"))
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        plain.load_state(str(tmp_path / "state"))


def test_weight_norm_is_none_of_our_business(tmp_path):
    model = build("bert")
    nn.utils.parametrizations.weight_norm(model.classifier)
    model.save_pretrained(tmp_path)
    assert any("original" in name for name in load_file(tmp_path / "model.safetensors"))
