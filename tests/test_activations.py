"""Quantized inputs of layers: the quantizer of the finished model, and what trains it."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import make_trainer, stacked
from hf_approx import SmolConfig
from hf_approx.methods.activations import NoisyActivation
from hf_approx.methods.precision import initial_limit
from hf_approx.modules.activation import ActivationQuantizer, install, uninstall
from models import batch


def quantizer(bits, limit=1.0, channels=1, signed=True):
    module = ActivationQuantizer(channels, signed)
    module.bits.copy_(torch.as_tensor(bits))
    module.limit.copy_(torch.as_tensor(limit))
    return module


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_levels_and_errors_are_those_of_the_specification(bits, signed):
    x = torch.linspace(-3, 3, 30001) if signed else torch.linspace(-1, 3, 20001)
    value = quantizer(bits, 2.5, signed=signed)(x)
    levels = value.unique()
    assert len(levels) == 2**bits
    assert float(levels[-1]) == 2.5
    assert float(levels[0]) == (-2.5 if signed else 0.0)
    inside = x.abs() <= 2.5 if signed else (x >= 0) & (x <= 2.5)
    sigma = 2.0 ** (1 - bits)
    worst = 2.5 * sigma / (2 - sigma) * (1.0 if signed else 0.5)
    assert float((value - x)[inside].abs().max()) == pytest.approx(worst, rel=1e-2)
    torch.testing.assert_close(quantizer(bits, 2.5, signed=signed)(value), value)


@pytest.mark.parametrize(
    ("layer", "shape", "dim"),
    [(nn.Linear(3, 2), (4, 5, 3), -1), (Conv1D(2, 3), (4, 5, 3), -1), (nn.Conv2d(3, 2, 1), (4, 3, 5, 6), 1)],
)
def test_channels_have_limits_of_their_own(layer, shape, dim):
    limits = torch.tensor([0.5, 1.0, 2.0])
    install(layer, quantizer([8.0, 8.0, 8.0], limits, channels=3))
    x = 10 * torch.ones(shape)
    clipped = limits.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)
    plain = copy.deepcopy(layer)
    uninstall(plain)
    torch.testing.assert_close(layer(x), plain(clipped.contiguous()))


def test_installing_again_replaces_and_removing_restores():
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    plain = layer(x)
    install(layer, quantizer(1))
    install(layer, quantizer(8, 4.0))
    torch.testing.assert_close(layer(x), plain, atol=0.1, rtol=0)
    assert set(layer.state_dict()) == {"weight", "bias", "input_quantizer.bits", "input_quantizer.limit"}
    uninstall(layer)
    assert torch.equal(layer(x), plain)
    assert set(layer.state_dict()) == {"weight", "bias"}


def noisy(signed=True, bits=3.0, channels=1):
    return NoisyActivation(channels, signed, 4, bits, "uniform", 0, torch.device("cpu"))


@pytest.mark.parametrize("signed", [True, False])
def test_noise_is_as_large_as_the_error_of_rounding(signed):
    module = noisy(signed)
    x = torch.rand(20000, 4) * 3
    module(x)
    module.start()
    assert float(module.log_limit.detach().exp()) == pytest.approx(float(x.max()))
    error = (module(x) - x).detach()
    rounded = (quantizer(3, float(x.max()), signed=signed)(x) - x).abs().max()
    assert float(error.abs().max()) == pytest.approx(float(rounded), rel=0.01)
    assert float(error.mean()) == pytest.approx(0, abs=0.01)
    module.eval()
    torch.testing.assert_close(module(x), x)


def test_noise_teaches_the_limits_and_rounding_the_largest_value():
    module = noisy()
    x = torch.randn(50, 4).requires_grad_()
    module(x)
    module.start()
    module(x).square().sum().backward()
    assert float(module.limits.grad.abs()) > 0
    module.frozen = True
    module.zero_grad()
    x.grad = None
    module.log_limit.data.fill_(0.0)
    module(x).sum().backward()
    assert torch.equal(x.grad, (x.detach().abs() <= 1).float())
    clipped = x.detach().clamp(-1, 1)
    expected = (module(x).detach() - torch.where(x.detach().abs() <= 1, clipped, 0)).sum()
    torch.testing.assert_close(module.log_limit.grad, expected.reshape(1))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_trained_model_has_quantizers_that_meet_the_budget(tmp_path, granularity):
    approx = SmolConfig(
        target_bits=4.0, group_size=16, activations=True, activation_bits=5.5, activation_granularity=granularity
    )
    trainer = make_trainer("bert", tmp_path, approx=approx, max_steps=10)
    trainer.train()
    found = [m for m in trainer.model.modules() if type(m) is ActivationQuantizer]
    assert len(found) == len(trainer.methods[0].modules)
    layers = [m for m in trainer.model.modules() if hasattr(m, "input_quantizer")]
    weights = [m.weight.shape[1] for m in layers]
    bits = [float(m.input_quantizer.bits.mean()) for m in layers]
    spent = sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)
    assert spent == pytest.approx(5.5, abs=0.02)
    assert trainer.approx_report["methods"][0]["activation_bits"] == pytest.approx(spent)
    inputs = batch("bert")
    trainer.model.eval()
    quantized = trainer.model(**inputs).logits
    for layer in layers:
        uninstall(layer)
    assert not torch.equal(quantized, trainer.model(**inputs).logits)


def test_inputs_said_to_be_positive_are_not_signed(tmp_path):
    approx = SmolConfig(activations=True, unsigned_activations=["output.dense"], group_size=16)
    trainer = make_trainer("bert", tmp_path, approx=approx, max_steps=2)
    trainer.train()
    layer = trainer.model.bert.encoder.layer[0]
    assert not layer.output.dense.input_quantizer.signed
    assert layer.intermediate.dense.input_quantizer.signed


def test_a_failed_attach_takes_the_quantizers_off():
    model = nn.ModuleDict({"a": nn.Linear(8, 4), "b": nn.Linear(8, 4)})
    config = SmolConfig(target_modules=["a", "b"], target_bits=2.25, granularity="tensor", activations=True)
    with pytest.raises(ValueError, match="cannot average"):
        stacked(model, config)
    assert not any(hasattr(module, "input_quantizer") or module._forward_pre_hooks for module in model.values())
    with pytest.raises(ValueError, match="has no numbers as input"):
        stacked(nn.ModuleList([nn.Embedding(8, 4)]), SmolConfig(target_modules=["0"], activations=True))


def test_initial_noise_is_that_of_the_initial_precision():
    assert float(noisy(bits=6.0).limits) == pytest.approx(initial_limit(6.0))
