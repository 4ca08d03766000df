"""Every method in a hand-written loop, on a model sharded by `fully_shard`, beside the same loop on a whole model.

Writes for each what both ended with, as the first process has it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_approx import (
    FixedPrecisionConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach_packing,
)
from hf_approx.methods.unsharding import Unsharded
from models import batch, build

STEPS = 6
BANKS = r".*hf_approx_banks.*"
METHODS = {
    "penalty": [
        SparsificationConfig(preset="paper", target_sparsity=None, initial_score=0.0, penalty=1e-7, mask_lr=0.05)
    ],
    "magnitudes": [SparsificationConfig(target_sparsity=0.7, score_init="magnitude", scope="layer")],
    "2:4": [SparsificationConfig(target_sparsity=0.5, granularity="2:4")],
    "columns": [SparsificationConfig(target_sparsity=0.5, granularity="column")],
    "heads": [SparsificationConfig(target_sparsity=0.5, granularity="head")],
    "sparse bits": [SparsificationConfig(target_sparsity=0.6), SmolConfig(target_bits=3.0, group_size=16)],
    "free bits": [SmolConfig(target_bits=None, penalty=1e-4, granularity="channel")],
    "shared": [SharingConfig(templates=1, recurrence=0.1), SparsificationConfig(target_modules=BANKS)],
    "magnitude": [MagnitudePruningConfig(target_sparsity=0.8, update_every=1)],
    "random": [MagnitudePruningConfig(target_sparsity=0.8, criterion="random")],
    "movement": [MovementPruningConfig(target_sparsity=0.8)],
    "soft movement": [MovementPruningConfig(target_sparsity=0.8, mode="soft")],
    "grid": [UniformQuantizationConfig(bits=4)],
    "rounded": [UniformQuantizationConfig(bits=4, mode="round")],
    "fixed": [FixedPrecisionConfig()],
}


def model(kind: str) -> nn.Module:
    made = build("gpt2" if kind == "2:4" else "bert").eval()
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if kind == "fixed":
        method = UniformQuantizationConfig(bits=4, mode="round").build()
        method.attach(made)
        names = method.finalize()
        attach_packing(made, names, grids=method.grids)
    return made


def train(kind: str, sharded: bool) -> dict[str, torch.Tensor]:
    """The final weights, and the numbers that were logged; nothing on processes that do not have them."""
    made, methods = model(kind), [config.build() for config in METHODS[kind]]
    for i, method in enumerate(methods):
        method.attach(made, methods[:i])
    if kind == "fixed":
        made.hf_quantizer.remove_quantization_config(made)
    twin = Unsharded(made, methods) if sharded else None
    if sharded:
        blocks = made.transformer.h if kind == "2:4" else made.bert.encoder.layer
        for block in blocks:
            fully_shard(block)
        fully_shard(made)
    groups = [group for method in methods for group in method.param_groups()]
    own = {id(param) for group in groups for param in group["params"]}
    rest = [param for param in made.parameters() if id(param) not in own]
    optimizer = torch.optim.Adam([{"params": rest, "lr": 1e-3}, *groups])
    inputs = batch("gpt2" if kind == "2:4" else "bert")
    labels = inputs["input_ids"] if kind == "2:4" else torch.tensor([0, 1, 0, 1])
    logged = []
    for step in range(STEPS):
        with torch.no_grad():  # leaves parameters of the outermost group whole
            made.eval()(**inputs)
        for method in methods:
            method.on_step(step / (STEPS - 1))
        loss = made.train()(**inputs, labels=labels).loss
        for method in methods:
            penalty = method.penalty()
            loss = loss if penalty is None else loss + penalty
        loss.backward()
        for method in methods:
            method.on_gradients()
        optimizer.step()
        optimizer.zero_grad()
        logged += [number for method in methods for number in method.metrics().values()]
    if twin is not None:
        if not twin.fill(made, methods):
            return {}
        made, methods = twin.model, twin.methods
    names = [name for method in reversed(methods) for name in method.bake()]
    for method in methods:
        names = method.remove(names)
    return {**made.state_dict(), "logged": torch.tensor(logged)}


def main(path: str) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    ended = {kind: train(kind, sharded=True) for kind in METHODS}
    if dist.get_rank() == 0:
        # Both processes saw the whole batch, so the averaged gradient was the gradient of one process.
        torch.save({kind: (ended[kind], train(kind, sharded=False)) for kind in METHODS}, path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
