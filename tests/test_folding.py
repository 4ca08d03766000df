"""Folding: clusters, loops, equality with the substituted model, and decoders that go on generating."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import assert_same_weights, make_trainer, weights
from hf_approx import SharingConfig, attach_packing, fold, layer_similarity
from hf_approx.folding import Loop, complete_linkage, find_loops
from hf_approx.modules.bank import banks_of, coefficients_of, shared_layers
from models import batch
from sharing import shared

BLOCK = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
"""Weights of one block below: attention and feed-forward layers."""


def llama(layers=6):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


def alternating(layers=6, templates=3, noise=0.0):
    """A shared model whose even blocks are alike, and its odd ones, up to sign and scale."""
    model = shared(llama(layers), templates=templates, init="random")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for entry in shared_layers(model).values():
            first = list(entry.layers.values())[:2]
            for i, layer in enumerate(entry.layers.values()):
                scale = (-1) ** (i // 2) * (1 + 0.1 * i)
                alpha = coefficients_of(first[i % 2]) * scale
                coefficients_of(layer).copy_(alpha + noise * torch.randn(alpha.shape, generator=generator))
    return model


def three_directions(**options):
    """A shared model with two templates a bank, whose blocks have one of three directions of coefficients."""
    model = shared(llama(6), templates=2, init="random", **options)
    with torch.no_grad():
        for entry in shared_layers(model).values():
            for i, layer in enumerate(entry.layers.values()):
                angle = torch.tensor(i % 3 * 1.0)
                coefficients_of(layer).copy_(torch.stack([angle.cos(), angle.sin()]) * (1 + 0.1 * i))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch("llama")).logits


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# P3
@pytest.mark.parametrize("space", ["coefficients", "weights"])
def test_folding_collinear_layers_leaves_the_function_and_finds_the_loop(space):
    model = alternating()
    before, expected = parameters(model), logits(model)
    report = fold(model, space=space)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert report.weight_error < 1e-5
    assert report.loops == {"model.layers": [Loop(("A", "B"), 3)]}
    assert report.to_dict()["loops"]["model.layers"]["text"] == "[A B] x 3"
    assert report.parameters_before == before
    assert report.parameters_after == parameters(model) == before - 3 * BLOCK - 6 * 7 * 3 + 2 * BLOCK + 6 * 7
    assert len(report.clusters) == 7
    for clusters in report.clusters.values():
        assert [[int(name.split(".")[2]) for name in cluster] for cluster in clusters] == [[0, 2, 4], [1, 3, 5]]
    scalars = [report.scalars[f"model.layers.{i}.mlp.up_proj"] for i in (0, 2, 4)]
    assert [s / scalars[0] for s in scalars] == pytest.approx([1.0, -1.2 / 1.0, 1.4 / 1.0], rel=1e-5)


def test_folding_again_changes_nothing():
    model = alternating()
    fold(model)
    before = weights(model)
    report = fold(model)
    assert report.clusters == {}
    assert report.loops == {"model.layers": [Loop(("A", "B"), 3)]}
    assert list(before) == list(weights(model))


def test_folding_above_every_similarity_changes_nothing():
    model = alternating(noise=0.3)
    expected = logits(model)
    largest = max(float((m - torch.eye(len(m))).max()) for m in layer_similarity(model, "weights").values())
    report = fold(model, threshold=(1 + largest) / 2)
    assert report.clusters == {}
    assert torch.equal(logits(model), expected)
    assert report.parameters_after == report.parameters_before


def test_the_error_of_a_pair_is_what_its_similarity_says():
    model = alternating(layers=2, templates=2)
    name = "layers-mlp-up_proj"
    with torch.no_grad():
        templates = [template.weight for template in banks_of(model)[name]]
        directions = torch.linalg.qr(torch.stack([weight.reshape(-1) for weight in templates], 1))[0]
        for weight, direction in zip(templates, directions.T, strict=True):
            weight.copy_(direction.reshape(weight.shape))
        coefficients = [coefficients_of(layer) for layer in shared_layers(model)[name].layers.values()]
        for alpha, angle in zip(coefficients, (0.0, 0.2), strict=True):
            alpha.copy_(torch.tensor([torch.tensor(angle).cos(), torch.tensor(angle).sin()]))
    report = fold(model, threshold=0.97, space="coefficients")
    assert list(report.clusters) == [name]
    # Both are projected on the direction half way between them.
    assert report.weight_error == pytest.approx(math.sin(0.1), rel=1e-4)


def test_more_clusters_than_templates_stay_mixes_of_the_bank():
    model = three_directions(target_modules=["up_proj"])
    before, expected = parameters(model), logits(model)
    report = fold(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert report.loops == {"model.layers": [Loop(("A", "B", "C"), 2)]}
    assert parameters(model) == before - 6 * 2 + 3 * 2 + 6
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_layers_is_the_number_that_is_left():
    model = alternating(noise=0.5)
    report = fold(model, layers=2)
    assert {len(clusters) for clusters in report.clusters.values()} == {2}
    assert len(banks_of(model)) == 14


@pytest.mark.parametrize("mixed", [False, True])
def test_a_folded_decoder_generates_the_same_tokens_after_saving(tmp_path, mixed):
    model = three_directions() if mixed else alternating(noise=1e-4)
    fold(model)
    assert len(banks_of(model)) == (7 * 4 if mixed else 7 * 2)
    attach_packing(model, [])
    prompt = torch.tensor([[5, 9, 11]])
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (1, 67)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert parameters(loaded) == parameters(model)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(prompt, use_cache=True, **options), cached)


def test_train_fold_train_on_and_save(tmp_path):
    trainer = make_trainer("llama", tmp_path / "a", SharingConfig(templates=2), llama(4), max_steps=2)
    trainer.train()
    model = trainer.model
    original = copy.deepcopy(model)
    report = fold(model, layers=1)
    assert [str(loop) for loop in report.loops["model.layers"]] == ["[A] x 4"]
    assert len(shared_layers(original)) == 7
    assert not torch.equal(logits(original), logits(model))
    model.save_pretrained(tmp_path / "folded")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "folded")
    assert torch.equal(logits(loaded), logits(model))
    again = make_trainer("llama", tmp_path / "b", (), loaded, max_steps=2)
    again.train()
    assert parameters(again.model) == report.parameters_after
    assert not torch.equal(logits(again.model), logits(model))
    again.save_model(str(tmp_path / "final"))
    final = LlamaForCausalLM.from_pretrained(tmp_path / "final")
    assert torch.equal(logits(final), logits(again.model))


def test_a_model_that_a_method_is_at_work_on_is_not_folded_and_trains_on(tmp_path):
    config = SharingConfig(templates=2, recurrence=0.1)
    trainer = make_trainer("llama", tmp_path, config, llama(3), max_steps=2)
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=r"fold: sharing is still at work on 'model.*; finalize the training"):
        fold(trainer.model, layers=2)
    assert_same_weights(weights(trainer.model), before)
    trainer.train()
    assert len(trainer.approx_report["methods"][0]["banks"]) == 7
    assert set(fold(trainer.model, layers=2).clusters) == set(trainer.approx_report["methods"][0]["banks"])
    trainer.save_model(str(tmp_path / "model"))
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "model")), logits(trainer.model))


def test_clusters_are_complete_linkage():
    rows = [[1.0, 0.96, 0.2, 0.90], [0.96, 1.0, 0.3, 0.99], [0.2, 0.3, 1.0, 0.0], [0.90, 0.99, 0.0, 1.0]]
    similarity = torch.tensor(rows, dtype=torch.float64)
    assert complete_linkage(similarity, 0.95) == [[0], [1, 3], [2]]
    assert complete_linkage(similarity, 0.9) == [[0, 1, 3], [2]]
    assert complete_linkage(similarity, 1.0) == [[0], [1], [2], [3]]
    assert complete_linkage(similarity, None, 2) == [[0, 1, 3], [2]]


@pytest.mark.parametrize(
    ("sequence", "text"),
    [
        ("ABABABC", "[A B] x 3, C"),
        ("AAAA", "[A] x 4"),
        ("ABC", "A B C"),
        ("XABAB", "X, [A B] x 2"),
        ("AABAAB", "[A A B] x 2"),
        ("", ""),
    ],
)
def test_loops_of_a_sequence(sequence, text):
    assert ", ".join(map(str, find_loops(sequence))) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.9, "layers": 1}, "not both"),
        ({"threshold": 0.0}, "threshold must be"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"layers": 0}, "layers must be"),
        ({"space": "angles"}, "space must be"),
        ({}, "shares no weights"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fold(llama(2), **options)
