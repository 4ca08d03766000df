"""Packed models whose weights were changed before they are saved again: training, new layers, merged adapters."""

import copy
import json
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers import make_trainer
from hf_approx import (
    FixedPrecisionConfig,
    MagnitudePruningConfig,
    SharingConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach_packing,
)
from hf_approx.checkpoint.changes import left_grid
from hf_approx.packing import Grid, expand, round_to_grid
from models import batch, build

KEY = "bert.encoder.layer.0.output.dense.weight"
TARGETS = ["query", "key", "value", "dense", "word_embeddings", "classifier"]


def quantized(folder, name="bert", config=None, **options):
    model = build(name)
    method = (config or UniformQuantizationConfig(bits=4, target_modules=options.pop("targets", TARGETS))).build()
    method.attach(model)
    attach_packing(model, method.finalize(), "float32", grids=method.grids, **options)
    model.save_pretrained(folder)
    return load(folder)


def load(folder):
    causal = "LMHead" in (folder / "config.json").read_text()
    return (AutoModelForCausalLM if causal else AutoModelForSequenceClassification).from_pretrained(folder)


def entries(folder):
    config = json.loads((folder / "config.json").read_text())
    return config.get("quantization_config", {"tensors": {}})["tensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    quantized(folder)
    return folder


@pytest.fixture
def said(caplog):
    def messages():
        found = [r.message for r in caplog.records if r.name.startswith("hf_approx") and r.levelno >= logging.WARNING]
        caplog.clear()
        return found

    return messages


def some_grid(bits, rows=64, columns=256, groups=4):
    generator = torch.Generator().manual_seed(0)
    map_ = torch.full((rows, groups), bits, dtype=torch.uint8)
    grid = Grid(map_, torch.rand(rows, groups, generator=generator) / 20 + 0.02)
    weight = round_to_grid(torch.randn(rows, columns, generator=generator) / 20, grid)
    step = expand(grid.scale, weight.shape) * 2 ** (2 - bits)
    return weight, grid, step


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_little_training_stays_near_its_grid_and_other_weights_do_not(bits):
    weight, grid, step = some_grid(bits)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    assert not left_grid(weight, grid)
    for size in (0.01, 0.05, 0.1):
        moved = weight + size * step * noise
        assert not left_grid(moved, grid)
        assert torch.equal(round_to_grid(moved, grid), weight)  # so it is rounded back to what it was
    for size in (0.2, 0.3, 1.0):
        assert left_grid(weight + size * step * noise, grid)
    assert left_grid(noise / 20, grid)
    assert left_grid(weight[torch.randperm(64, generator=torch.Generator().manual_seed(2))], grid)
    assert left_grid(weight * 1.3, grid)


def test_one_row_of_many_is_enough():
    weight, grid, _ = some_grid(4, rows=1000)
    weight[7] = torch.randn(256, generator=torch.Generator().manual_seed(3)) / 20
    assert left_grid(weight, grid)


def test_a_weight_without_bits_that_is_no_longer_zero_left():
    weight, grid, _ = some_grid(4)
    grid.bits[3, 1] = 0
    weight = round_to_grid(weight, grid)
    weight[3, 64:128] = 0
    assert not left_grid(weight, grid)
    weight[3, 100] = 1e-6
    assert left_grid(weight, grid)


def test_half_precision_and_back_is_no_change(said):
    for bits in (2, 4, 8):
        weight, grid, _ = some_grid(bits)
        for dtype in (torch.float16, torch.bfloat16):
            assert not left_grid(weight.to(dtype), grid)
            assert not left_grid(weight.to(dtype).float(), grid)


def new_layer(model):
    torch.manual_seed(5)
    model.bert.encoder.layer[0].output.dense = nn.Linear(64, 32)
    return [KEY]


def wider_head(model):
    torch.manual_seed(5)
    model.classifier = nn.Linear(32, 5)
    model.num_labels = model.config.num_labels = 5
    return ["classifier.weight"]


def swapped_layers(model):
    layers = model.bert.encoder.layer
    layers[0], layers[1] = layers[1], layers[0]
    return [n for n, _ in model.named_parameters() if "encoder" in n and n.endswith("weight") and "Norm" not in n]


def other_state(model):
    other = build("bert", seed=3)
    method = UniformQuantizationConfig(bits=3, target_modules=TARGETS).build()
    method.attach(other)
    attach_packing(other, method.finalize(), grids=method.grids)
    names = list(model.config.quantization_config.tensors)
    model.load_state_dict(other.state_dict())
    return names


def more_tokens(model):
    model.resize_token_embeddings(51)
    return ["bert.embeddings.word_embeddings.weight"]


def one_row_of_an_embedding(model):
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5] = torch.linspace(-0.1, 0.1, 32)
    return ["bert.embeddings.word_embeddings.weight"]


def merged_adapter(model):
    torch.manual_seed(5)
    with torch.no_grad():
        model.get_parameter(KEY).add_(torch.randn(32, 2) @ torch.randn(2, 64) / 20)
    return [KEY]


CHANGES = [new_layer, wider_head, swapped_layers, other_state, more_tokens, one_row_of_an_embedding, merged_adapter]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("way", ["save", "attach", "trainer"])
def test_other_weights_are_stored_as_they_are(folder, tmp_path, said, change, way):
    model = load(folder)
    changed = change(model)
    expected = copy.deepcopy(model.state_dict())
    if way == "attach":
        attach_packing(model, ["classifier.weight"], "float32")
    if way == "trainer":  # which trains nothing, and packs what there is
        trainer = make_trainer("bert", tmp_path / "run", [], model=model, max_steps=1, learning_rate=0.0)
        trainer.store_dtype = "float32"
        trainer.train()
    model.save_pretrained(tmp_path / "again")
    (message,) = said()
    assert any(message.startswith(f"'{name}'") for name in changed)
    assert "kept as it is" in message
    loaded = load(tmp_path / "again")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in expected.items())
    stored = entries(tmp_path / "again")
    assert not set(changed) & set(stored)
    assert set(stored) == set(entries(folder)) - set(changed)
    model.save_pretrained(tmp_path / "once more")
    assert said() == []
    assert (tmp_path / "once more" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()


def test_a_sparse_layer_of_other_weights_is_packed_as_sparse(folder, tmp_path, said):
    model = load(folder)
    torch.manual_seed(5)
    model.bert.encoder.layer[0].output.dense = nn.Linear(64, 32)
    with torch.no_grad():
        weight = model.get_parameter(KEY)
        weight.masked_fill_(torch.rand_like(weight) < 0.9, 0)
    model.save_pretrained(tmp_path)
    assert len(said()) == 1
    assert entries(tmp_path)[KEY].get("kind", "sparse") == "sparse"
    assert torch.equal(load(tmp_path).get_parameter(KEY), model.get_parameter(KEY))


def test_a_dense_layer_in_the_place_of_a_sparse_one_is_dense(tmp_path, said):
    model = quantized(tmp_path / "a", config=MagnitudePruningConfig(target_sparsity=0.9))
    new_layer(model)
    model.save_pretrained(tmp_path / "b")
    (message,) = said()
    assert KEY in message
    assert KEY not in entries(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b").get_parameter(KEY), model.get_parameter(KEY))


def test_a_layer_of_its_own_in_the_place_of_a_shared_one(tmp_path):
    model = quantized(tmp_path / "a", config=SharingConfig(templates=0.5))
    new_layer(model)
    model.save_pretrained(tmp_path / "b")
    assert KEY not in entries(tmp_path / "b")
    assert torch.equal(load(tmp_path / "b").get_parameter(KEY), model.get_parameter(KEY))


def test_more_tokens_of_a_tied_embedding(tmp_path, said):
    model = build("gpt2")
    params = dict(model.named_parameters())
    grids = {}
    for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.weight"):
        rows = len(params[name])
        grids[name] = Grid(torch.full((rows, 1), 4, dtype=torch.uint8), torch.full((rows, 1), 0.03))
    attach_packing(model, [], "float32", grids)
    before = model.transformer.wte.weight.detach().clone()
    model.resize_token_embeddings(51)
    model.save_pretrained(tmp_path / "b")
    (message,) = said()
    assert "transformer.wte.weight" in message
    loaded = load(tmp_path / "b")
    assert torch.equal(loaded.transformer.wte.weight[:48], before)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert entries(tmp_path / "b")


def test_training_a_little_is_rounded_and_said(folder, tmp_path, said):
    model = load(folder)
    before = model.get_parameter(KEY).detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(3):
        model.train()(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
    assert not torch.equal(model.get_parameter(KEY), before)
    model.save_pretrained(tmp_path)
    (message,) = said()
    assert "saved rounded to it" in message
    assert set(entries(tmp_path)) == set(entries(folder))
    assert torch.equal(load(tmp_path).get_parameter(KEY), before)


def test_training_a_lot_is_stored_as_it_is(folder, tmp_path, said):
    model = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model.train()(**batch("bert"), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    assert any("kept as it is" in message for message in said())
    assert torch.equal(load(tmp_path).get_parameter(KEY), model.get_parameter(KEY))


def test_fixed_precision_trains_what_is_on_its_grid(folder, tmp_path, said):
    model = load(folder)
    new_layer(model)
    trainer = make_trainer("bert", tmp_path, FixedPrecisionConfig(), model=model, max_steps=2)
    assert len(said()) == 1
    assert KEY.removesuffix(".weight") not in trainer.methods[0].modules
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert said() == []
    assert set(entries(tmp_path / "saved")) == set(entries(folder)) - {KEY}
    assert torch.equal(load(tmp_path / "saved").get_parameter(KEY), model.get_parameter(KEY))


def fewer_layers(model):
    model.bert.encoder.layer = nn.ModuleList([model.bert.encoder.layer[1]])
    model.config.num_hidden_layers = 1


def a_whole_layer(model):
    attention = model.bert.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(32, 32))
    attention.output.dense = nn.Linear(32, 32)
    attention.self.num_attention_heads, attention.self.all_head_size = 2, 32


def layers_of_other_sizes(model):
    a_whole_layer(model)
    swapped_layers(model)


@pytest.mark.parametrize("change", [fewer_layers, a_whole_layer, layers_of_other_sizes], ids=lambda c: c.__name__)
@pytest.mark.parametrize("attach", [False, True])
def test_sizes_are_those_of_the_layers_there_are(tmp_path, change, attach):
    model = quantized(tmp_path / "a", config=SparsificationConfig(target_sparsity=0.5, granularity="head"))
    change(model)
    if attach:
        attach_packing(model, ["bert.encoder.layer.0.attention.self.query.weight"], "float32")
    model.save_pretrained(tmp_path / "b")
    loaded = load(tmp_path / "b")
    with torch.no_grad():
        assert torch.equal(*(m.eval()(**batch("bert")).logits for m in (model, loaded)))
