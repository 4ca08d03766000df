"""Short runs of every method in float64, whose losses do not depend on how the methods are computed.

`data/trajectories.json` holds those of the code that computed weights in the forward pass (commit dc5b780), made by

    git worktree add --detach /tmp/before dc5b780
    PYTHONPATH=/tmp/before:tests python tests/trajectories.py tests/data/trajectories.json
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn

from hf_approx.methods import (
    LayerDroppingConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
)
from models import build, dataset

STEPS = 12
BANKS = r".*hf_approx_banks.*\d"
CS = SparsificationConfig(target_sparsity=0.8)
SMOL = SmolConfig(target_bits=4.0, group_size=8)
UNIFORM = UniformQuantizationConfig(bits=4)
RUNS = {
    "cs": [CS],
    "cs, paper": [SparsificationConfig(target_sparsity=0.8, preset="paper")],
    "cs, paper, penalty": [SparsificationConfig(target_sparsity=None, preset="paper", penalty=1e-4)],
    "cs of rows": [SparsificationConfig(target_sparsity=0.5, granularity="row")],
    "supermask": [SparsificationConfig(target_sparsity=0.5, train_weights=False)],
    "magnitude": [MagnitudePruningConfig(target_sparsity=0.8, update_every=2)],
    "movement": [MovementPruningConfig(target_sparsity=0.8)],
    "soft movement": [MovementPruningConfig(target_sparsity=0.8, mode="soft", penalty=1.0)],
    "uniform": [UNIFORM],
    "smol": [SMOL],
    "smol, rounded": [SmolConfig(target_bits=3.0, noise_fraction=0.0)],
    "smol, penalty": [SmolConfig(target_bits=None, group_size=8, penalty=1e-5)],
    "smol, inputs": [SmolConfig(target_bits=4.0, group_size=8, activations=True)],
    "sharing": [SharingConfig(templates=0.5, recurrence=1.0)],
    "cs and uniform": [CS, UNIFORM],
    "cs and smol": [CS, SMOL],
    "sharing and cs": [SharingConfig(templates=2), SparsificationConfig(target_sparsity=0.5, target_modules=BANKS)],
    "layers, cs": [SparsificationConfig(target_sparsity=0.5, granularity="layer")],
    "neurons, cs": [SparsificationConfig(target_sparsity=0.5, granularity="neuron")],
    "layers": [LayerDroppingConfig(target_sparsity=0.5)],
}
"""Of which ResNet has only those that remove no layers or neurons."""
NAMES = [
    (model, run)
    for model in ("bert", "gpt2", "resnet", "llama")
    for run in RUNS
    if model != "resnet" or not run.startswith(("layers", "neurons"))
]


def start(name):
    """A model without dropout, and the batches it is trained on."""
    model = build(name).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    examples = dataset(name, 4 * STEPS, seed=3)
    batches = []
    for i in range(STEPS):
        part = examples[4 * i : 4 * i + 4]
        batch = {key: torch.stack([torch.as_tensor(example[key]) for example in part]) for key in part[0]}
        batches.append({key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    return model, batches


def after(model, batch):
    """The loss of the finished model."""
    with torch.no_grad():
        return model.eval()(**batch).loss.item()


def before(name, run):
    """The losses of a loop around methods that are called one by one, as it was before there was a stack."""
    model, batches = start(name)
    methods = []
    for config in RUNS[run]:
        method = config.build()
        method.attach(model, methods)
        methods.append(method)
    groups = [group for method in methods for group in method.param_groups()]
    own = {id(param) for group in groups for param in group["params"]}
    others = [param for param in model.parameters() if param.requires_grad and id(param) not in own]
    optimizers = [torch.optim.AdamW(others, lr=3e-3)] + ([torch.optim.Adam(groups, fused=True)] if groups else [])
    losses = []
    for step, batch in enumerate(batches):
        for method in methods:
            method.on_step(step / (STEPS - 1))
        loss = model(**batch).loss
        losses.append(loss.item())
        penalties = [penalty for penalty in (method.penalty() for method in methods) if penalty is not None]
        sum(penalties, loss).backward()
        for method in methods:
            method.on_gradients()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for method in methods:
        if not method.is_final:
            method.settle()
    names = [name for method in reversed(methods) for name in method.bake()]
    for method in sorted(methods, key=lambda method: method.renames):
        names = method.remove(names)
    return [*losses, after(model, batches[0])]


def same_noise():
    """Let the earlier code draw the noise that is drawn now: it took that of a generator of torch."""
    from hf_approx.methods import activations, noise

    def draw(shape, key, law, device):
        seed, step, index = key
        state = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % (1 << 64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> shift)) * factor % (1 << 64)
        start = (state >> 32) - (1 << 31)
        number = torch.arange(shape.numel(), dtype=torch.int32).mul_(0x9E3779B9 - (1 << 32)).add_(start)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32))):
            number.bitwise_xor_((number >> shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor).add_(start)
        return number.float().mul_(2.0**-31).reshape(shape)

    noise.draw = activations.draw = draw


if __name__ == "__main__":
    torch.set_num_threads(1)
    same_noise()
    found = {f"{name}: {run}": before(name, run) for name, run in NAMES}
    lines = [f"{json.dumps(label)}: {json.dumps(losses)}" for label, losses in found.items()]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")
