"""Compression beside accuracy in `evaluate`, without a network."""

import math

import evaluate
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hf_approx.metrics
from helpers import ROOT, stacked
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
from hf_approx.metrics import Compression
from hf_approx.packing import Grid
from hf_approx.targets import select_targets
from models import build

ACCURACY = str(ROOT / "recipes" / "metrics" / "accuracy.py")


def tensor_bytes(folder):
    """All of a safetensors file but its header."""
    data = (folder / "model.safetensors").read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.fixture(scope="module")
def sparse():
    """Three quarters of each layer are zeros, and packed so."""
    model = build("bert").eval()
    names = [target.name for target in select_targets(model).values()]
    with torch.no_grad():
        for name in names:
            param = model.get_parameter(name)
            param.view(-1)[: param.numel() * 3 // 4] = 0
    attach_packing(model, names, "float16")
    return model


@pytest.fixture(scope="module")
def folder(sparse, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    sparse.save_pretrained(folder)
    return folder


def test_combined_with_accuracy(folder):
    both = evaluate.combine([evaluate.load(ACCURACY), Compression(folder)])
    found = both.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    assert found["accuracy"] == 0.75
    assert found["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert found["bytes"] == tensor_bytes(folder)
    assert found["dense_bytes"] == 2 * sum(param.numel() for param in build("bert").parameters())
    assert found["compression"] == found["dense_bytes"] / found["bytes"] > 1
    assert "bits" not in found


def test_combined_batch_by_batch(folder):
    both = evaluate.combine({"accuracy": evaluate.load(ACCURACY), "size": Compression(folder)}, force_prefix=True)
    both.add_batch(predictions=[0, 1], references=[0, 0])
    both.add(prediction=1, reference=1)
    found = both.compute()
    assert found["accuracy_accuracy"] == pytest.approx(2 / 3)
    assert found["size_bytes"] == tensor_bytes(folder)


def test_loaded_from_its_file(folder):
    loaded = evaluate.load(hf_approx.metrics.__file__, model=str(folder))
    assert loaded.compute(predictions=["any"], references=None) == Compression().compute(model=folder)


def test_a_model_in_memory_is_measured_as_saved(sparse, folder):
    assert Compression(sparse).compute() == Compression(folder).compute()


def test_a_dense_model_is_its_own_size(tmp_path):
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    found = Compression().compute(model=model)
    assert found == {
        "sparsity": 0,
        "bytes": tensor_bytes(tmp_path),
        "dense_bytes": tensor_bytes(tmp_path),
        "compression": 1,
    }


def test_bits_are_those_stored(tmp_path):
    model = build("gpt2")
    names = [target.name for target in select_targets(model).values()]
    shapes = {name: model.get_parameter(name).shape for name in names}
    grids = {
        name: Grid(torch.full(shape, 4, dtype=torch.uint8), torch.full((1, 1), 0.05)) for name, shape in shapes.items()
    }
    attach_packing(model, names, "float16", grids)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = sum(math.prod(shape) for shape in shapes.values())
    found = Compression().compute(model=tmp_path)
    assert found["bits"] == pytest.approx(8 * sum(len(stored[name]) for name in names) / weights)
    assert 4 < found["bits"] < 4.5


@pytest.mark.parametrize(
    "config",
    [
        SparsificationConfig(),
        SparsificationConfig(granularity="head", target_sparsity=0.5),
        LayerDroppingConfig(target_sparsity=0.5),
        MagnitudePruningConfig(),
        MovementPruningConfig(),
        SmolConfig(target_bits=4.0, activations=True),
        UniformQuantizationConfig(),
    ],
    ids=lambda config: type(config).__name__,
)
def test_a_model_in_training_is_refused_until_the_method_is_done(config):
    model, dense = build("bert"), Compression(build("bert")).compute()
    stack, _ = stacked(model, config)
    with pytest.raises(ValueError, match=r"at work on 'bert.*measure the model after training"):
        Compression(model).compute()
    stack.detach()
    assert Compression(model).compute() == dense
    stacked(model, config)[0].finalize()
    assert Compression(model).compute()["bytes"] < dense["bytes"]


def test_parametrizations_that_are_part_of_a_model_are_measured():
    shared, dense = build("bert"), Compression(build("bert")).compute()
    stack, _ = stacked(shared, SharingConfig(templates=0.5))
    with pytest.raises(ValueError, match=r"sharing is at work on 'bert.*measure the model after training"):
        Compression(shared).compute()
    stack.bake()
    assert Compression(shared).compute()["bytes"] < dense["bytes"]
    normalized = build("bert")
    nn.utils.parametrizations.weight_norm(normalized.classifier)
    found = Compression(normalized).compute()
    assert found["bytes"] == dense["bytes"] + 4 * normalized.classifier.out_features


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="give the model, to the metric or to compute"):
        Compression().compute()
    with pytest.raises(FileNotFoundError, match="has no config"):
        Compression(tmp_path).compute()
