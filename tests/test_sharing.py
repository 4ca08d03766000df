"""Soft parameter sharing: the parametrization, its start, and training."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from helpers import assert_same_weights, make_trainer, stacked, weights
from hf_approx import PackedFormatError, SharingConfig, SparsificationConfig, block_similarity, layer_similarity
from hf_approx.modules.bank import banks_of, coefficients_of, shared_layers, template_names, unshare
from models import batch, build, dataset
from sharing import attach, deep_bert, logits, parameters, shared
from wide_resnet import WideResNet, published_sharing


class Stack(nn.Module):
    """Convolutions of equal shape, one after the other."""

    def __init__(self, layers=3, channels=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


# P1
@pytest.mark.parametrize("baked", [False, True], ids=["at work", "baked"])
def test_mixed_weight_is_the_sum_of_template_layers_and_so_are_its_gradients(baked):
    torch.manual_seed(0)
    model = Stack().double()
    stack, method = stacked(model, SharingConfig(templates=2, init="random"))
    names = list(method.modules)
    if baked:
        stack.bake()
    bank = banks_of(model)["layers"]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    layer = model.layers[1]
    alpha = coefficients_of(layer)
    parts = [nn.functional.conv2d(x, t.weight, None, padding=1) * a for t, a in zip(bank, alpha, strict=True)]
    torch.testing.assert_close(layer(x), sum(parts) + layer.bias[:, None, None], rtol=0, atol=1e-14)

    plain = copy.deepcopy(model)
    for name in names if baked else ():
        unshare(plain.get_submodule(name))
    assert all(type(layer.weight) is nn.Parameter for layer in plain.layers)
    assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    if not baked:
        stack.before_step()
    plain(x).square().sum().backward()
    own = [layer.weight.grad for layer in plain.layers]
    alphas = torch.stack([coefficients_of(layer) for layer in model.layers])
    for k, template in enumerate(bank):
        for i, grad in enumerate(own):
            torch.testing.assert_close(coefficients_of(model.layers[i]).grad[k], (grad * template.weight).sum())
        expected = sum(a * grad for a, grad in zip(alphas[:, k], own, strict=True))
        torch.testing.assert_close(template.weight.grad, expected)


# P2
@pytest.mark.parametrize(("layers", "templates"), [(3, 3), (2, 2), (6, 2), (4, 1)])
def test_random_start_is_orthogonal_and_the_similarity_matrix_is_one(layers, templates):
    model = Stack(layers)
    attach(model, templates=templates, init="random")
    alpha = shared_layers(model)["layers"].coefficients.detach().double()
    product = alpha @ alpha.T if layers <= templates else alpha.T @ alpha
    torch.testing.assert_close(product, torch.eye(len(product), dtype=torch.float64), rtol=0, atol=1e-6)
    matrix = layer_similarity(model)["layers"]
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(layers, dtype=torch.float64))
    assert 0 <= float(matrix.min()) <= float(matrix.max()) <= 1
    expected = torch.ones_like(matrix) if templates == 1 else torch.eye(layers, dtype=torch.float64)
    if templates in (1, layers):
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-6)
    std = float(torch.cat([t.weight.detach().reshape(-1) for t in banks_of(model)["layers"]]).std())
    assert std == pytest.approx((2 / 36) ** 0.5, rel=0.25)


def test_similarity_ignores_scale_and_in_weights_is_that_of_the_weights():
    model = Stack(4)
    stack, method = stacked(model, SharingConfig(templates=3, init="random"))
    before = layer_similarity(method)["layers"]
    with torch.no_grad():
        coefficients_of(model.layers[2]).mul_(-3.7)
    stack.write()
    torch.testing.assert_close(layer_similarity(model)["layers"], before, rtol=0, atol=1e-6)
    flat = torch.stack([layer.weight.detach().reshape(-1) for layer in model.layers]).double()
    flat = flat / flat.norm(dim=1, keepdim=True)
    expected = (flat @ flat.T).abs()
    torch.testing.assert_close(layer_similarity(model, "weights")["layers"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="space must be"):
        layer_similarity(model, "angle")
    with pytest.raises(ValueError, match="shares no weights"):
        layer_similarity(Stack())


def test_block_similarity_is_the_mean_over_the_banks_of_two_blocks():
    model = deep_bert(3)
    attach(model, templates=2)
    matrices = layer_similarity(model)
    assert len(matrices) == 6
    blocks = block_similarity(model)
    assert list(blocks) == ["bert.encoder.layer"]
    torch.testing.assert_close(blocks["bert.encoder.layer"], torch.stack(list(matrices.values())).mean(0))


# P4, P5
def test_every_bank_is_once_in_the_model_and_coefficients_do_not_decay(tmp_path):
    model = deep_bert()
    before = parameters(model)
    trainer = make_trainer("bert", tmp_path, SharingConfig(templates=2), model, weight_decay=0.1)
    layers = list(trainer.methods[0].modules.values())
    blocks = 4 * (4 * 32 * 32 + 2 * 32 * 64)
    expected = before - blocks + blocks // 2 + 4 * 2 * 6

    def banks_are_once():
        names = list(model.state_dict())
        assert sorted(n for n in names if "hf_approx_banks" in n) == sorted(template_names(model))
        assert not any("_bank" in name and "hf_approx_banks" not in name for name in names)

    banks_are_once()
    optimizer = trainer.create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {decay[id(named[name])] for name in template_names(model)} == {0.1}
    assert {decay[id(coefficients_of(layer))] for layer in layers} == {0.0}
    assert decay.keys() == {id(p) for p in named.values()} - {id(m.weight) for m in layers} | {
        id(coefficients_of(layer)) for layer in layers
    }
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == expected
    trainer.stack.bake()
    banks_are_once()
    assert parameters(model) == expected
    per_block = sum(p.numel() for n, p in model.bert.encoder.layer[0].named_parameters() if "original" in n)
    assert per_block == 2 * 6
    named = dict(model.named_parameters())
    plain = make_trainer("bert", tmp_path, (), model, weight_decay=0.1).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in plain.param_groups for p in group["params"]}
    assert {decay[id(p)] for name, p in named.items() if name.endswith("original")} == {0.0}


def test_one_fixed_template_is_the_mean_and_ties_all_layers():
    model = deep_bert()
    layers = [block.output.dense for block in model.bert.encoder.layer]
    mean = torch.stack([layer.weight.detach() for layer in layers]).mean(0)
    method = attach(model, templates=1, coefficients="fixed")
    for layer in layers:
        torch.testing.assert_close(layer.weight, mean)
        assert torch.equal(layer.weight, layers[0].weight)
        assert not coefficients_of(layer).requires_grad
    assert method.param_groups() == []
    random = Stack(5)
    attach(random, templates=1, coefficients="fixed", init="random")
    assert all(torch.equal(layer.weight, random.layers[0].weight) for layer in random.layers)


@pytest.mark.parametrize(("layers", "templates", "runs"), [(6, 3, [2, 2, 2]), (5, 2, [3, 2]), (3, 3, [1, 1, 1])])
def test_fixed_templates_are_the_means_of_runs_of_neighbours(layers, templates, runs):
    model = Stack(layers)
    own = [layer.weight.detach().clone() for layer in model.layers]
    attach(model, templates=templates, coefficients="fixed")
    start = 0
    for length in runs:
        mean = torch.stack(own[start : start + length]).mean(0)
        for layer in model.layers[start : start + length]:
            torch.testing.assert_close(layer.weight, mean)
            assert torch.equal(layer.weight, model.layers[start].weight)
        start += length
    assert start == layers


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "resnet"])
def test_as_many_templates_as_layers_leave_the_function_and_random_ones_train(name):
    model = build(name)
    expected = logits(model, name)
    options = {"target_modules": r".*layer\.\d\.convolution"} if name == "resnet" else {}
    if name == "resnet":
        with pytest.raises(ValueError, match="no two target modules"):
            attach(build(name), target_modules=["0.convolution"])
    attach(model, templates=1.0, **options)
    torch.testing.assert_close(logits(model, name), expected, rtol=0, atol=1e-5)
    scratch = build(name)
    stack, method = stacked(scratch, SharingConfig(init="random", **options))
    output = scratch.train()(**batch(name))
    output.logits.square().mean().backward()
    stack.before_step()
    learned = {key: coefficients_of(layer) for key, layer in method.modules.items()}
    learned.update((key, scratch.get_parameter(key)) for key in template_names(scratch))
    for key, param in learned.items():
        assert param.grad is not None, key
        assert param.grad.abs().sum() > 0, key


def test_pretrained_start_is_the_best_approximation():
    model = Stack(5)
    flat = torch.stack([layer.weight.detach().reshape(-1) for layer in model.layers]).double()
    singular = torch.linalg.svdvals(flat)
    attach(model, templates=2)
    mixed = torch.stack([layer.weight.detach().reshape(-1) for layer in model.layers]).double()
    assert float((flat - mixed).square().sum()) == pytest.approx(float(singular[2:].square().sum()), rel=1e-4)


def test_the_start_from_layers_keeps_some_and_is_nearest_for_the_others():
    model = Stack(5)
    own = [layer.weight.detach().clone() for layer in model.layers]
    attach(model, templates=2, init="layers")
    kept = torch.stack([own[i].reshape(-1) for i in (0, 2)]).double()
    for i, layer in enumerate(model.layers):
        if i in (0, 2):
            assert torch.equal(layer.weight, own[i])
            continue
        # The residual of a least-squares fit is orthogonal to what was fitted.
        rest = (own[i] - layer.weight.detach()).reshape(-1).double()
        torch.testing.assert_close(kept @ rest, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-4)
        assert rest.norm() < own[i].norm()


def test_the_start_from_equal_layers_is_exact():
    model = Stack(4)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.weight.copy_(model.layers[0].weight * (i + 1))
    own = [layer.weight.detach().clone() for layer in model.layers]
    attach(model, templates=2, init="layers")
    for layer, weight in zip(model.layers, own, strict=True):
        torch.testing.assert_close(layer.weight, weight)


def test_encoder_and_decoder_have_banks_of_their_own():
    model = build("t5")
    method = attach(model)
    assert {bank.split("-")[0] for bank in method.banks} == {"encoder", "decoder"}
    assert all(len({layer.split(".")[0] for layer in layers}) == 1 for layers in method.banks.values())
    groups = {"q": r".*SelfAttention\.q"}
    assert len(attach(build("t5"), groups=groups).banks["q"]) == 4


def test_copies_share_their_own_bank():
    model = shared(deep_bert())
    clone = copy.deepcopy(model)
    assert torch.equal(logits(model), logits(clone))
    with torch.no_grad():
        for name in template_names(clone):
            clone.get_parameter(name).zero_()
    assert not clone.bert.encoder.layer[0].output.dense.weight.any()
    assert model.bert.encoder.layer[0].output.dense.weight.any()
    assert list(model.half().state_dict()) == list(clone.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": 0}, "templates must be"),
        ({"templates": 1.5}, "templates must be"),
        ({"templates": True}, "templates must be"),
        ({"init": "svd"}, "init must be"),
        ({"coefficients": "fixed", "recurrence": 0.1}, "set recurrence=0"),
        ({"coefficients": "fixed", "init": "layers"}, "leave out init"),
        ({"coefficients": "free"}, "coefficients must be"),
        ({"recurrence": -1.0}, "recurrence must be"),
        ({"recurrence_warmup": 2.0}, "recurrence_warmup must be"),
        ({"coefficient_lr": float("nan")}, "coefficient_lr must be"),
        ({"groups": {}}, "groups must map"),
        ({"groups": {"a.b": "x"}}, "a bank's name"),
        ({"groups": {"keys": "x"}}, "not an attribute of modules"),
        ({"groups": {"a": "x"}, "target_modules": "y"}, "leave out target_modules"),
    ],
)
def test_bad_configs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SharingConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": 5}, "more than the 4 layers"),
        ({"groups": {"a": ["output.dense"]}}, "different shapes"),
        ({"groups": {"a": r".*layer\.0\.intermediate\.dense"}}, "it needs two"),
        ({"groups": {"a": ["query"], "b": ["query", "key"]}}, "in groups 'a' and 'b'"),
        ({"target_modules": ["pooler.dense"]}, "no two target modules"),
        ({"target_modules": ["nothing"]}, "matches"),
    ],
)
def test_a_config_that_does_not_fit_leaves_the_model_alone(options, message):
    model = deep_bert()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **options)
    assert_same_weights(weights(model), before)


def test_a_later_method_that_fails_gives_the_weights_back(tmp_path):
    model = deep_bert()
    before = weights(model)
    with pytest.raises(ValueError, match="is mixed from templates"):
        make_trainer("bert", tmp_path, [SharingConfig(), SparsificationConfig()], model)
    assert_same_weights(weights(model), before)
    attach(model)
    before = weights(model)
    with pytest.raises(ValueError, match=r"Another method works on '.*' already"):
        attach(model)
    assert_same_weights(weights(model), before)
    other = shared(deep_bert())
    with pytest.raises(ValueError, match=r"works on '.*' already, or it shares its weight"):
        attach(other)


def test_recurrence_penalty_makes_layers_alike(tmp_path):
    method = attach(Stack(4), templates=4, init="random", recurrence=2.0, recurrence_warmup=0.5)
    method.on_step(0.25)
    assert method.penalty().item() == pytest.approx(1.0, abs=1e-5)
    method.on_step(1.0)
    assert method.penalty().item() == pytest.approx(2.0, abs=1e-5)
    assert attach(Stack(4)).penalty() is None
    same = attach(Stack(4), templates=1, recurrence=2.0)
    same.on_step(1.0)
    assert same.penalty().item() == pytest.approx(0.0, abs=1e-6)

    config = SharingConfig(templates=2, recurrence=10.0, coefficient_lr=0.03)
    trainer = make_trainer("bert", tmp_path, config, deep_bert(), max_steps=30)
    before = trainer.methods[0].metrics()["similarity"]
    trainer.train()
    report = trainer.approx_report["methods"][0]
    assert report["similarity"] > before + 0.2
    assert trainer.approx_report["history"][-1]["sharing/similarity"] > before
    bank = report["banks"]["encoder-layer-output-dense"]
    assert len(bank["layers"]) == 4
    assert bank["templates"] == 2
    assert torch.tensor(bank["similarity"]["weights"]).shape == (4, 4)


def test_resume_is_exact(tmp_path):
    config = SharingConfig(recurrence=0.1)
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    full = make_trainer("bert", tmp_path / "a", config, deep_bert(), **options)
    full.train()
    half = make_trainer("bert", tmp_path / "b", config, deep_bert(), **options)
    half.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same_weights(weights(full.model), weights(half.model))
    with pytest.raises(PackedFormatError, match="unfinished training"):
        BertForSequenceClassification.from_pretrained(tmp_path / "a" / "checkpoint-2")


@pytest.mark.parametrize("option", ["gradient_checkpointing", "bf16", "torch_compile"])
def test_trains_with(option, tmp_path):
    options = {option: True, "max_steps": 2}
    if option == "torch_compile":
        options["torch_compile_backend"] = "aot_eager"
    model = deep_bert(2)
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0
    reference = make_trainer("bert", tmp_path / "a", SharingConfig(), copy.deepcopy(model).eval(), max_steps=2)
    reference.train()
    trainer = make_trainer("bert", tmp_path / "b", SharingConfig(), model, **options)
    trainer.train()
    tolerance = 0.05 if option == "bf16" else 1e-3
    torch.testing.assert_close(logits(trainer.model), logits(reference.model), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("depth", "width", "templates", "count"),
    [
        (28, 10, None, 36479194),
        (28, 10, 1, 12287212),
        (28, 10, 2, 17125630),
        (28, 10, 6, 36479302),
        (28, 14, 1, 24054508),
        (28, 18, 1, 39737580),
    ],
)
def test_shared_wide_resnets_have_the_published_sizes(depth, width, templates, count):
    with torch.device("meta"):
        model = WideResNet(depth, width)
    if templates:
        stack, method = stacked(model, published_sharing(templates))
        assert len(method.modules) == 18
        stack.bake()
        assert len(layer_names(model)) == 18
    assert parameters(model) == count


def layer_names(model):
    return [name for entry in shared_layers(model).values() for name in entry.layers]


def test_a_small_shared_wide_resnet_runs():
    torch.manual_seed(0)
    model = WideResNet(16, 1)
    stack, _ = stacked(model, published_sharing(2))
    images = torch.stack([example["pixel_values"] for example in dataset("vit", 4)])
    model(images).sum().backward()
    stack.before_step()
    own = [p for group in stack.param_groups() for p in group["params"]]
    assert len(own) == 6
    assert all(p.grad is not None for p in [*stack.parameters(), *own])
    with pytest.raises(ValueError, match="depth must be"):
        WideResNet(15)


def test_plot_similarity(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_approx.similarity_plots import plot_similarity

    model = deep_bert(3)
    attach(model)
    plot_similarity(layer_similarity(model), tmp_path / "similarity.png")
    assert (tmp_path / "similarity.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no similarity matrix"):
        plot_similarity({}, tmp_path / "none.png")


def test_a_sequential_that_would_run_templates_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="a Sequential runs all it holds"):
        stacked(model, SharingConfig(groups={"a": ["0", "1"]}, templates=1))
    assert list(weights(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert model(torch.ones(4)).shape == (4,)
    inside = nn.ModuleDict({"layers": model})
    stacked(inside, SharingConfig(groups={"a": ["layers.0", "layers.1"]}, templates=1))[0].bake()
    assert model(torch.ones(4)).shape == (4,)
