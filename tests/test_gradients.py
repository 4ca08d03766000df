"""Gradients of all that is trained against autograd through the formulas, in float64; and what scales them."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hf_approx import attach
from hf_approx.methods.noise import draw, noise_keys
from hf_approx.modules.bank import template_names
from stacks import BANK, CS, LATE, MAGNITUDE, MOVEMENT, PENALIZED, SHARING, SMALL, SMOL, UNIFORM, small, small_loss

HALVES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
"""Sizes of noise, and scales: products with float32 noise are exact."""


def sigmoid_mask(stage, weight, own):
    mask = torch.sigmoid(stage.temperature * own["scores"]) * stage.scale
    return weight * mask


def rows(stage, weight, own):
    return weight * torch.sigmoid(stage.temperature * own["scores"])[:, None]


def binary(stage, weight, own):
    return weight * stage.mask


def movement(stage, weight, own):
    straight = own["scores"] - own["scores"].detach()
    return weight * ((own["scores"] >= stage.threshold) + straight)


def grid(stage, weight, own):
    """scale * round(clip(w / scale)), straight through the rounding."""
    bits, scale = stage.bits.double(), own["log_scale"].exp()
    limit = 2 - 2 ** (1 - bits)
    inside = torch.minimum(torch.maximum(weight / scale, -limit), limit)
    step = 2 ** (2 - bits)
    nearest = ((inside.detach() / step - 0.5).round() + 0.5) * step
    nearest = torch.where(weight == 0, 0.0, nearest.clamp(-limit, limit))
    return scale * (inside + (nearest - inside).detach())


def noise(stage, weight, own):
    """clip(w) + scale * sigma(s) * eps, with s kept out of the clip range and no noise on zeros."""
    scale, sigma = own["log_scale"].exp(), torch.sigmoid(own["limits"]).repeat_interleave(4, 1)
    limit = 2 - sigma.detach()
    eps = draw(weight.shape, noise_keys(stage.seed, stage.step, stage.indices, weight), stage.law).double()
    inside = torch.minimum(torch.maximum(weight / scale, -limit), limit)
    return scale * (inside + sigma * torch.where(weight == 0, 0.0, eps))


def late(stage, weight, own):
    return weight


CASES = {
    "cs": ([CS], [sigmoid_mask]),
    "cs, penalty": ([PENALIZED], [sigmoid_mask]),
    "rows": ([replace(CS, granularity="row", score_init="constant")], [rows]),
    "magnitude": ([MAGNITUDE], [binary]),
    "movement": ([MOVEMENT], [movement]),
    "soft movement": ([replace(MOVEMENT, mode="soft", penalty=1.0)], [movement]),
    "smol": ([replace(SMOL, target_bits=None, penalty=1e-3)], [noise]),
    "rademacher": ([replace(SMOL, target_bits=None, penalty=1e-3, noise="rademacher")], [noise]),
    "uniform": ([UNIFORM], [grid]),
    "late": ([LATE], [late]),
    "cs and smol": ([CS, replace(SMOL, target_bits=None, penalty=1e-3)], [sigmoid_mask, noise]),
    "magnitude and uniform": ([MAGNITUDE, UNIFORM], [binary, grid]),
    "movement and uniform": ([MOVEMENT, UNIFORM], [movement, grid]),
    "sharing": ([replace(SHARING, recurrence=0.0)], []),
    "sharing and cs": ([replace(SHARING, recurrence=0.0), replace(CS, **BANK)], [sigmoid_mask]),
    "sharing and uniform": ([replace(SHARING, recurrence=0.0), replace(UNIFORM, **BANK)], [grid]),
}


def penalty_of(method, stages):
    """In closed form, of the parameters that stages have here."""
    config = method.config
    if method.name == "sparsification" and config.target_sparsity is None:
        masks = [torch.sigmoid(stage.temperature * own["scores"]) * stage.scale for stage, own in stages]
        return config.penalty * sum(mask.sum() for mask in masks)
    if method.name == "movement" and config.mode == "soft":
        return config.penalty * torch.cat([own["scores"].sigmoid().reshape(-1) for _, own in stages]).mean()
    if method.name == "smol":
        # A limit governs four weights, whose bits above one are -log2 of sigma(s).
        return config.penalty * sum(-4 * torch.sigmoid(own["limits"]).log2().sum() for _, own in stages)
    return 0.0


def spread_out(stack):
    """Move all that is trained to where no formula has a corner, with weights that clip and others that are zero."""
    generator = torch.Generator().manual_seed(3)
    for latent in stack.latents:
        for stage in latent.stages:
            stage.double()
            for name, param in stage.named_parameters():
                values = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                if name == "log_scale":
                    values = HALVES[torch.arange(param.numel()) % 4].reshape(param.shape).log()
                elif name == "limits":
                    values = torch.logit(HALVES[torch.arange(param.numel()) % 4].reshape(param.shape))
                param.data = values
        if not latent.mixes:
            latent.weight.data[0, 0] = 0.0
    for method in stack.methods:
        if method.name == "magnitude":
            method.settle()
        for stage in method.stages.values():
            if method.name == "sparsification":
                stage.temperature.fill_(3.0)
            if method.name == "movement":
                stage.threshold.fill_(0.1)
    stack._batches.clear()  # what is stacked of other dtypes
    stack.write()


@pytest.mark.parametrize(("configs", "formulas"), CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_formula(configs, formulas):
    """Of two batches, as in one step of gradient accumulation."""
    stack = attach(small().double(), configs)
    model = stack.model
    spread_out(stack)
    leaves, owns, effective = {}, {}, {}
    latents = {latent.target.name: latent for latent in stack.latents}

    def leaf(param):
        return leaves.setdefault(id(param), param.detach().clone().requires_grad_(param.requires_grad))

    for name, latent in latents.items():
        if not latent.mixes:
            value = leaf(latent.weight)
            for stage, formula in zip(latent.stages, formulas, strict=True):
                owns[id(stage)] = {key: leaf(param) for key, param in stage.named_parameters()}
                value = formula(stage, value, owns[id(stage)])
            effective[name] = value
    templates = [effective.pop(name, None) for name in template_names(model)]
    templates = [
        leaf(model.get_parameter(name)) if value is None else value
        for name, value in zip(template_names(model), templates, strict=True)
    ]
    for name, latent in latents.items():
        if latent.mixes:
            effective[name] = sum(a * template for a, template in zip(leaf(latent.weight), templates, strict=True))
    for name, param in model.named_parameters():
        if name not in latents and name not in template_names(model):
            effective[name] = leaf(param)
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(model.get_parameter(name).detach(), effective[name].detach(), rtol=0, atol=1e-12)

    class Formula(nn.Module):
        def __getitem__(self, index):
            return model[index]

        def __call__(self, x):
            return functional_call(model, effective, (x,))

    total = sum(small_loss(Formula(), step) for step in (0, 1))
    for method in stack.methods:
        total = total + penalty_of(method, [(stage, owns.get(id(stage))) for stage in method.stages.values()])
    total.backward()

    for step in (0, 1):
        small_loss(model, step).backward()
    stack.before_step()
    trained = [*stack.parameters(), *(param for group in stack.param_groups() for param in group["params"])]
    compared = 0
    for param in trained:
        if id(param) not in leaves:
            continue
        expected = leaves[id(param)].grad
        if expected is None:
            assert param.grad is None or not param.grad.any()
            continue
        torch.testing.assert_close(param.grad, expected, rtol=1e-9, atol=1e-9)
        assert param.grad.any()
        compared += 1
    assert compared == len({id(param) for param in trained})


@pytest.mark.parametrize("configs", SMALL.values(), ids=SMALL)
def test_gradients_of_a_scaled_loss_are_as_many_times_as_large(configs):
    """Penalties and what keeps budgets of bits are scaled with it; what is noted of gradients is not."""

    def gradients(scale):
        stack = attach(small(), configs)
        found = []
        for progress in (0.0, 0.1):
            stack.advance(progress)
            for step in (0, 1):
                (small_loss(stack.model, step) * scale).backward()
            stack.before_step(scale)
            params = [*stack.parameters(), *(param for group in stack.param_groups() for param in group["params"])]
            assert all(param.grad is not None for param in params)
            found.append([param.grad.clone() for param in params])
            stack.zero_grad()
        return found, stack.state_dict()

    (plain, state), (scaled, other) = gradients(1.0), gradients(1024.0)
    for before, after in zip(plain, scaled, strict=True):
        assert all(torch.equal(a * 1024.0, b) for a, b in zip(before, after, strict=True))
        assert any(a.any() for a in before)
    assert state["methods"] == other["methods"]
    assert all(torch.equal(tensor, other["tensors"][name]) for name, tensor in state["tensors"].items())
