"""Quantizing trained models without training their weights: what changes, what it gains, and what is refused."""

import copy
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from helpers import assert_same_weights, every_latent, make_trainer, weights
from hf_approx import SmolConfig, SparsificationConfig, attach_packing
from hf_approx.loops import calibrate, round_weights
from hf_approx.loops.distillation import Divergence
from hf_approx.methods import MethodStack, smol
from hf_approx.packing.grid import expand, round_to_grid
from models import VOCAB, batch, build, dataset, uneven

CONFIG = SmolConfig(target_bits=3.0, group_size=16)


def accelerator(precision="no"):
    AcceleratorState._reset_state()
    return Accelerator(cpu=True, mixed_precision=precision)


def batches(name, size=32, seed=0):
    examples = [{k: v for k, v in e.items() if k != "labels"} for e in dataset(name, size, seed)]
    return DataLoader(examples, 8)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "resnet"])
def test_only_target_weights_change_and_they_are_only_rounded(name):
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    before, trains = weights(model), {n: p.requires_grad for n, p in model.named_parameters()}
    result = calibrate(model, batches(name), CONFIG, steps=6, held_out=batches(name, 8, 1))
    after = weights(model)
    assert before.keys() == after.keys()
    assert set(result.names) == set(result.grids)
    for key, tensor in before.items():
        grid = result.grids.get(key)
        assert torch.equal(after[key], tensor if grid is None else round_to_grid(tensor, grid)), key
    bits = [expand(grid.bits, before[key].shape).float().reshape(-1) for key, grid in result.grids.items()]
    assert float(torch.cat(bits).mean()) == pytest.approx(3.0, abs=0.02)
    assert result.bits == pytest.approx(3.0, abs=0.02)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trains
    assert all(module.training for module in model.modules())
    assert 0 <= result.calibrated.loss < 1


def test_nothing_is_held_for_weights_that_are_not_trained(monkeypatch):
    """No gradient once a step has its limits' and scales', and no optimizer state: those alone are in Adam."""
    model, seen, learning = build("bert"), [], []
    pull, adam = MethodStack.before_step, torch.optim.Adam

    def watched(stack, *args):
        pull(stack, *args)
        seen.append([param.grad for param in model.parameters()])
        seen.append([owner.weight.grad for owner in (*stack.latents, *stack.batches())])
        own = [param for latent in stack.latents for stage in latent.stages for param in stage.parameters()]
        assert {id(param) for param in own} == {id(p) for group in optimizers[0].param_groups for p in group["params"]}
        learning.append(all(param.grad is not None for param in own))

    optimizers = []
    monkeypatch.setattr(MethodStack, "before_step", watched)
    monkeypatch.setattr(torch.optim, "Adam", lambda groups: optimizers.append(adam(groups)) or optimizers[-1])
    calibrate(model, batches("bert"), CONFIG, steps=4)
    assert learning[0]
    assert len(seen) == 8
    assert not any(grad is not None for grads in seen for grad in grads)


def test_calibration_gives_bits_to_the_layer_that_needs_them():
    """The second layer hardly matters: nearly all of its bits can go to the first."""
    model = uneven()
    result = calibrate(model, batches("bert", 64), CONFIG, steps=60, held_out=batches("bert", 64, 1))
    assert result.calibrated.loss < 0.5 * result.rounded.loss
    assert result.calibrated.agreement >= result.rounded.agreement
    used = {key: float(grid.bits.float().mean()) for key, grid in result.grids.items()}
    first, second = ([used[key] for key in used if f"layer.{i}." in key] for i in (0, 1))
    assert sum(first) / len(first) > sum(second) / len(second) + 1.5


@pytest.mark.parametrize(
    ("options", "taken"), [({}, "calibrated"), ({"scale_lr": 1.0, "noise_fraction": 0.0}, "rounded")]
)
def test_the_better_model_is_taken_and_measured_by_its_divergence_from_the_dense_one(options, taken):
    config = replace(CONFIG, **options)
    model, held_out = uneven().double(), batches("bert", 13, 1)
    dense, nearest = copy.deepcopy(model), copy.deepcopy(model)
    result = calibrate(model, batches("bert"), config, steps=20, held_out=held_out)
    assert result.taken == taken
    assert (result.calibrated.loss < result.rounded.loss) == (taken == "calibrated")
    round_weights(nearest, config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), nearest.parameters(), strict=True)) == (
        taken == "rounded"
    )
    assert not every_latent(model)
    measured = result.calibrated if taken == "calibrated" else result.rounded
    inputs = {"input_ids": torch.cat([each["input_ids"] for each in held_out])}
    with torch.no_grad():
        before, after = (m(**inputs).logits.log_softmax(-1) for m in (dense, model))
    assert measured.loss == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-9)
    assert measured.agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))


def exact_divergence(logits, wanted):
    """Of two lists of logits, from the definition, with 60 digits."""
    with localcontext(prec=60):
        a, b = ([Decimal(value) for value in row] for row in (logits, wanted))
        norms = [sum(value.exp() for value in row).ln() for row in (a, b)]
        return sum((y - norms[1]).exp() * ((y - norms[1]) - (x - norms[0])) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("classes", [2, 50])
@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.3, 3.0, 200.0])
def test_small_divergences_have_their_digits_too(size, classes):
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(3, classes, generator=generator) * 4
    logits = wanted + size * torch.linspace(-1, 1, classes) + torch.tensor([[0.0], [7.0], [-7.0]])
    logits.requires_grad_()
    found = Divergence.apply(logits, wanted)
    exact = [float(exact_divergence(a, b)) for a, b in zip(logits.tolist(), wanted.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(exact, rel=1e-4 + 1e-5 / size)
    assert Divergence.apply(logits.double(), wanted.double()).tolist() == pytest.approx(exact, rel=1e-8)
    found.sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(-1) - wanted.softmax(-1))
    assert Divergence.apply(wanted, wanted).tolist() == [0, 0, 0]


def test_without_target_bits_there_is_nothing_to_round_to():
    config = SmolConfig(target_bits=None, group_size=16)
    result = calibrate(uneven(), batches("bert"), config, steps=2, held_out=batches("bert", 8, 1))
    assert result.rounded is None
    assert result.calibrated is not None
    assert result.taken == "calibrated"


def test_the_loss_of_numbers_is_a_share_of_their_size_over_all_batches():
    model = build("bert").bert.double().eval()
    dense, held_out = copy.deepcopy(model), batches("bert", 13, 1)
    result = calibrate(model, batches("bert"), CONFIG, steps=2, held_out=held_out)
    inputs = {"input_ids": torch.cat([each["input_ids"] for each in held_out])}
    with torch.no_grad():
        before, after = (m(**inputs).last_hidden_state for m in (dense, model))
    measured = result.calibrated if result.taken == "calibrated" else result.rounded
    assert measured.loss == pytest.approx(float((before - after).square().sum() / before.square().sum()), rel=1e-9)


def test_padding_does_not_count():
    losses = []
    for padding in (0, 5):
        ids = torch.randint(3, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([ids, torch.full((4, padding), 7)], 1)
        mask = (torch.arange(8 + padding) < 8).long().expand(4, -1)
        held_out = [{"input_ids": row, "attention_mask": kept} for row, kept in zip(ids, mask, strict=True)]
        model = build("gpt2").double()
        result = calibrate(model, batches("gpt2"), CONFIG, steps=2, held_out=DataLoader(held_out, 4))
        losses.append(result.rounded.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_padded_labels_of_an_encoder_decoder_do_not_count():
    losses = []
    for padding in (0, 5):
        ids = torch.randint(3, VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
        labels = torch.cat([ids, torch.full((4, padding), -100)], 1)
        held_out = [{"input_ids": row, "labels": wanted} for row, wanted in zip(ids, labels, strict=True)]
        model, loader = build("t5").double(), DataLoader(held_out, 4)
        losses.append(calibrate(model, loader, CONFIG, steps=2, held_out=loader).rounded.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_models_of_numbers_and_of_several_labels():
    numbers, regression, labels = (uneven().double() for _ in range(3))
    labels.config.problem_type = "multi_label_classification"
    regression.config.problem_type = "regression"
    kinds = {
        "hidden states": (numbers.bert, None),
        "regression": (regression, None),
        "several labels": (labels, 1.0),
    }
    for kind, (model, agreement) in kinds.items():
        result = calibrate(
            model, batches("bert"), SmolConfig(target_bits=8.0), steps=2, held_out=batches("bert", 8, 1)
        )
        assert result.calibrated.agreement == agreement, kind
        assert 0 < result.calibrated.loss < 1e-3, kind


def test_inputs_of_layers_can_be_quantized_too():
    model = uneven()
    config = SmolConfig(target_bits=4.0, group_size=16, activations=True)
    result = calibrate(model, batches("bert"), config, steps=20, held_out=batches("bert", 8, 1))
    assert result.taken == "calibrated"
    quantizer = model.bert.encoder.layer[0].output.dense.input_quantizer
    assert quantizer.limit > 0
    assert float(quantizer.bits.mean()) == pytest.approx(8, abs=1)
    assert result.bits == pytest.approx(4.0, abs=0.02)


def test_zeros_stay_zero_in_calibration(tmp_path):
    model = uneven()
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight.mul_(torch.rand_like(weight) > 0.5)
    zeros = weight == 0
    result = calibrate(model, batches("bert"), CONFIG, steps=6)
    attach_packing(model, result.names, grids=result.grids)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.bert.encoder.layer[0].output.dense.weight == 0, zeros)


def test_the_same_seed_gives_the_same_model():
    first, second, other = (build("bert") for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        torch.rand(seed + 3)
        calibrate(model, batches("bert"), SmolConfig(target_bits=3.0, group_size=16, seed=seed), steps=6)
    assert_same_weights(weights(first), weights(second))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (DataLoader([]), {}, "no batch"),
        (DataLoader([torch.ones(2)]), {}, "must be mappings"),
        ([batch("bert")], {}, "loader must be a torch.utils.data.DataLoader, got a list; wrap the data in DataLoader"),
        (batches("bert").dataset, {}, "loader must be a torch.utils.data.DataLoader, got a "),
        (batches("bert"), {"held_out": [batch("bert")]}, "held_out must be a torch.utils.data.DataLoader, got a list"),
        (batches("bert"), {"config": 4}, r"config must be a SmolConfig, such as .* got 4"),
        (
            batches("bert"),
            {"config": SparsificationConfig()},
            "config must be a SmolConfig, .* got SparsificationConfig",
        ),
        (batches("bert"), {"steps": 1}, "steps must be"),
        (batches("bert"), {"config": SmolConfig(target_modules=["nothing"])}, "No module"),
        (batches("bert"), {"held_out": DataLoader([])}, "nothing to measure"),
    ],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_cannot_be_calibrated_is_left_alone(loader, options, message, precision):
    model = build("bert").eval()
    before, wanted = weights(model), model(**batch("bert")).logits
    model.train()
    with pytest.raises(ValueError, match=message):
        calibrate(model, loader, **options, accelerator=accelerator(precision))
    assert_same_weights(weights(model), before)
    assert all(param.requires_grad for param in model.parameters())
    assert model.training
    assert torch.equal(model.eval()(**batch("bert")).logits, wanted)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused(kind, monkeypatch):
    model, sharding = build("bert"), accelerator()
    before = weights(model)
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", kind)
    with pytest.raises(ValueError, match=f"{kind.value} shards; launch without it"):
        calibrate(model, batches("bert"), CONFIG, steps=2, held_out=batches("bert", 8, 1), accelerator=sharding)
    assert_same_weights(weights(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SmolConfig(activations=True), "set activations=False, or use calibrate"),
        ({"target_bits": 4.0}, "round_weights: config must be a SmolConfig, .* got {'target_bits': 4.0}"),
    ],
    ids=["inputs", "config"],
)
def test_rounding_without_data_refuses_what_it_cannot_do(config, message):
    model = build("bert")
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        round_weights(model, config)
    assert_same_weights(weights(model), before)


def test_after_bf16_the_model_computes_in_its_own_precision_and_can_be_prepared_again():
    model = uneven()
    calibrate(model, batches("bert"), CONFIG, steps=2, accelerator=accelerator("bf16"))
    own = AutoModelForSequenceClassification.from_config(model.config).eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact, again = own(**batch("bert")).logits, model(**batch("bert")).logits
        assert torch.equal(again, exact)
        rounded = accelerator("bf16").prepare(model)(**batch("bert")).logits
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("others", [True, False], ids=["others train", "others frozen"])
def test_a_trainer_only_rounds_the_weights(tmp_path, others):
    model = build("bert")
    for param in model.parameters():
        param.requires_grad_(others)
    before = weights(model)
    approx = SmolConfig(target_bits=3.0, group_size=16, train_weights=False)
    trainer = make_trainer("bert", tmp_path, approx, model, learning_rate=1e-2, weight_decay=0.1)
    trainer.store_dtype = None
    limits = [noise.limits.detach().clone() for noise in trainer.methods[0].noises]
    noises = trainer.methods[0].noises
    trainer.train()
    assert any(not torch.equal(a, noise.limits) for a, noise in zip(limits, noises, strict=True))
    grids = trainer.methods[0].grids
    assert trainer.approx_report["totals"]["bits"] == pytest.approx(3.0, abs=0.02)
    for name, tensor in weights(model).items():
        if name in grids:
            assert torch.equal(tensor, round_to_grid(before[name], grids[name])), name
        elif "position_ids" not in name:
            assert torch.equal(tensor, before[name]) != others or not tensor.is_floating_point(), name
    assert all(param.requires_grad == others for param in model.parameters())


def test_scales_are_fitted_once_where_nothing_is_trained(monkeypatch):
    fits = []
    fit = smol.fit_scale
    monkeypatch.setattr(smol, "fit_scale", lambda *args: fits.append(1) or fit(*args))
    result = round_weights(build("bert"), SmolConfig(target_bits=3))
    assert len(fits) == len(result.names)
