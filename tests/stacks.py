"""Shared by the tests of `MethodStack`: every method and some stacks, on models small enough for all of them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_approx import (
    FixedPrecisionConfig,
    LayerDroppingConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach,
)
from models import batch, build

ON = {"target_modules": ["0", "2"]}
BANK = {"target_modules": r"hf_approx_banks\..*"}
CS = SparsificationConfig(target_sparsity=0.5, mask_lr=0.05, **ON)
PENALIZED = replace(CS, target_sparsity=None, preset="paper", penalty=1e-2)
MAGNITUDE = MagnitudePruningConfig(target_sparsity=0.5, update_every=1, **ON)
MOVEMENT = MovementPruningConfig(target_sparsity=0.5, **ON)
SMOL = SmolConfig(target_bits=4.0, group_size=4, lr=0.05, **ON)
UNIFORM = UniformQuantizationConfig(bits=3, **ON)
LATE = replace(UNIFORM, mode="round")
SHARING = SharingConfig(groups={"a": ["0", "2"]}, templates=2, recurrence=0.1)
SMALL = {
    "cs": [CS],
    "cs, penalty": [PENALIZED],
    "supermask": [replace(CS, train_weights=False, scale_mask=False)],
    "2:4": [replace(CS, granularity="2:4")],
    "rows": [replace(CS, granularity="row")],
    "magnitude": [MAGNITUDE],
    "random": [replace(MAGNITUDE, criterion="random")],
    "movement": [MOVEMENT],
    "soft movement": [replace(MOVEMENT, mode="soft", penalty=1.0)],
    "smol": [SMOL],
    "smol, penalty": [replace(SMOL, target_bits=None, penalty=1e-3)],
    "smol, inputs": [replace(SMOL, activations=True)],
    "smol, fixed weights": [replace(SMOL, train_weights=False)],
    "uniform": [UNIFORM],
    "late": [LATE],
    "sharing": [SHARING],
    "cs and smol": [CS, SMOL],
    "magnitude and uniform": [MAGNITUDE, UNIFORM],
    "movement and late": [MOVEMENT, LATE],
    "sharing and cs": [SHARING, replace(CS, **BANK)],
    "sharing and smol": [SHARING, replace(SMOL, **BANK)],
    "apart": [replace(CS, target_modules=["0"]), replace(SMOL, target_modules=["2"])],
}
LARGE = {
    "layers": [SparsificationConfig(granularity="layer", target_sparsity=0.5, mask_lr=0.05)],
    "heads": [SparsificationConfig(granularity="head", target_sparsity=0.5)],
    "neurons": [SparsificationConfig(granularity="neuron", target_sparsity=0.5)],
    "dropped layers": [LayerDroppingConfig(target_sparsity=0.5)],
    "fixed precision": [FixedPrecisionConfig()],
    "fixed precision and scale": [FixedPrecisionConfig(train_scale=False)],
}
STEPS = 8


class Small(nn.Module):
    """Three layers, of which two have one shape."""

    def __init__(self):
        super().__init__()
        for name, out in {"0": 8, "2": 8, "4": 4}.items():
            self.add_module(name, nn.Linear(8, out))

    def __getitem__(self, index):
        return self.get_submodule(str(index))

    def forward(self, x):
        return self[4](self[2](self[0](x).tanh()).tanh())


def small():
    torch.manual_seed(0)
    return Small()


def large():
    model = build("bert")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def quantized():
    model = large()
    attach(model, UniformQuantizationConfig(bits=4)).finalize()
    return model


def small_loss(model, step):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 8, generator=generator), torch.randint(0, 4, (16,), generator=generator)
    return nn.functional.cross_entropy(model(x.to(model[0].weight)), y)


def large_loss(model, step):
    return model(**batch("bert"), labels=torch.tensor([0, 1, 0, step % 2])).loss


def each(*groups):
    """Parameters of a test: what makes a model, the configs and the loss at a step."""
    found = []
    for name, configs in {k: v for group in groups for k, v in group.items()}.items():
        make = quantized if "fixed precision" in name else large if name in LARGE else small
        found.append(pytest.param(make, configs, large_loss if name in LARGE else small_loss, id=name))
    return pytest.mark.parametrize(("make", "configs", "loss"), found)


def bind(stack, steps=STEPS):
    return stack.bind(torch.optim.AdamW(stack.parameters(), lr=0.01), steps=steps)


def loop(stack, loss, optimizer, steps=range(STEPS)):
    """The three lines of any loop."""
    for step in steps:
        loss(stack.model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
