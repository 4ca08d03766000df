"""In which dtype recipes train checkpoints that are stored in half precision, packed or quantized."""

import csv
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertTokenizerFast
from transformers.utils import is_compressed_tensors_available

import text_classification
from common import RecipeConfig
from config_files import ConfigError, read_yaml
from helpers import make_trainer
from hf_approx import SmolConfig, SparsificationConfig, export_model
from models import build
from text_classification import Recipe

WORDS = ["good", "fine", "nice", "bad", "awful", "poor"]
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
SPACING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the distance between two neighbours, relative to the smaller one."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tokenizer and a config without a model."""
    folder = tmp_path_factory.mktemp("words")
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    with open(folder / "words.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *([word, i % 2] for i, word in enumerate(WORDS * 8))])
    files = {split: str(folder / "words.csv") for split in ("train", "validation")}
    options = {
        "dataset": {"path": "csv", "data_files": files},
        "text_columns": "text",
        "training": {"max_steps": 6, "learning_rate": 1e-6, "use_cpu": True, "optim": "adamw_torch"},
        "approx": [{"method": "sparsification", "target_sparsity": 0.5}],
    }
    return options, tokenizer


def write(data, folder, model):
    """A config of a saved model; returns its path."""
    options, tokenizer = data
    if model is not None:
        model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": str(folder / "model"), **options}))
    return path


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_small_updates_of_a_half_precision_model_are_not_lost(data, tmp_path, stored):
    """Six steps of 1e-6 are less than half of the distance between the numbers that large weights are stored in."""
    before = build("bert").to(stored)
    path = write(data, tmp_path, before)
    assert text_classification.main(["--config", str(path), "--output_dir", str(tmp_path / "out")]) == 0
    dense, compressed = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("dense", "compressed"))
    old = before.state_dict()[QUERY].float()
    assert dense[QUERY].dtype == torch.float32
    moved = (dense[QUERY] - old).abs()
    assert ((moved > 0) & (moved < 1e-5)).float().mean() > 0.99
    assert {tensor.dtype for tensor in compressed.values()} == {torch.float16, torch.uint8}
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(row["reloaded_equal"] for row in rows.values())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_training_in_half_precision_has_to_be_asked_for(data, tmp_path, dtype):
    """Then the same updates are lost, in all weights that are large enough."""
    before = build("bert").bfloat16()
    path = write(data, tmp_path, before)
    options = ["--set", f"dtype={dtype}", "--set", "store_dtype=null"]
    assert text_classification.main(["--config", str(path), "--output_dir", str(tmp_path / "out"), *options]) == 0
    dense, compressed = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("dense", "compressed"))
    old = before.state_dict()[QUERY]
    assert dense[QUERY].dtype == torch.bfloat16
    large = old.abs().float() * SPACING[torch.bfloat16] > 6e-6 * 2
    assert large.float().mean() > 0.5
    assert torch.equal(dense[QUERY][large], old[large])
    assert {tensor.dtype for tensor in compressed.values()} == {torch.bfloat16, torch.uint8}


def finished(approx, folder):
    """A model that `approx` has packed, saved in a folder; what it computes with."""
    trainer = make_trainer("bert", folder / "training", approx)
    trainer.train()
    trainer.save_model(folder / "model")
    return trainer.model.state_dict()


@pytest.mark.parametrize("dtype", ["float32", "auto", "bfloat16", "float16"])
@pytest.mark.parametrize("approx", [SparsificationConfig(target_sparsity=0.8), SmolConfig(target_bits=3)])
def test_packed_models_load_in_every_dtype(data, tmp_path, approx, dtype):
    state = finished(approx, tmp_path)
    config = read_yaml(RecipeConfig, write(data, tmp_path, None), [f"dtype={dtype}"])
    loaded = Recipe(config, str(tmp_path)).model().state_dict()
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    for name, tensor in state.items():
        wanted = tensor.to(expected) if tensor.is_floating_point() else tensor
        assert torch.equal(loaded[name], wanted), name
        assert loaded[name].dtype == wanted.dtype


def test_a_packed_model_trains_on_and_keeps_its_zeros(data, tmp_path):
    state = finished(SparsificationConfig(target_sparsity=0.8), tmp_path)
    path = write(data, tmp_path, None)
    options = ["--set", "approx=[]", "--set", "training.learning_rate=1e-3"]
    assert text_classification.main(["--config", str(path), "--output_dir", str(tmp_path / "out"), *options]) == 0
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "dense").state_dict()[QUERY]
    assert torch.equal(found == 0, state[QUERY] == 0)
    assert not torch.equal(found, state[QUERY])


@pytest.mark.skipif(not is_compressed_tensors_available(), reason="compressed-tensors is missing")
def test_models_that_others_quantized_load(data, tmp_path):
    state = finished(SmolConfig(target_bits=3), tmp_path)
    (tmp_path / "model").rename(tmp_path / "packed")
    export_model(tmp_path / "packed", tmp_path / "model", "compressed-tensors")
    model = Recipe(read_yaml(RecipeConfig, write(data, tmp_path, None)), str(tmp_path)).model()
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7]])
        plain = build("bert")
        plain.load_state_dict(state)
        assert torch.allclose(model.eval()(ids).logits, plain.eval()(ids).logits, atol=1e-5)
    assert model.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_scaled_gradients_want_float32_weights(data, tmp_path, dtype):
    path = write(data, tmp_path, build("bert").half())
    config = read_yaml(RecipeConfig, path, [f"dtype={dtype}", "training.fp16=true"])
    with pytest.raises(ConfigError, match="fp16 scales the gradients of float32 weights; set dtype: float32"):
        Recipe(config, str(tmp_path)).trainer("dense", compressed=False)
