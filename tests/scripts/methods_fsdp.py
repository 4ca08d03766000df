"""Every method in a hand-written loop, on a model sharded by `fully_shard`, beside the same loop on a whole model.

Writes for each what both ended with, as the first process has it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_approx import (
    FixedPrecisionConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach,
)
from hf_approx.methods.unsharding import Unsharded
from models import VOCAB, batch, build

STEPS = 6
BANKS = r".*hf_approx_banks.*"
UNEVEN = r".*(intermediate\.dense|classifier)"
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
    "rows": [SparsificationConfig(target_sparsity=0.5, granularity="row")],
    "neurons": [SparsificationConfig(target_sparsity=0.5, granularity="neuron", mask_lr=0.05)],
    "bits of weights": [SmolConfig(target_bits=3.0, granularity="weight")],
    "bits of weights for free": [SmolConfig(target_bits=None, penalty=1e-5, granularity="weight", noise="rademacher")],
    "groups of gpt2": [SmolConfig(target_bits=3.0, group_size=16)],
    "channels of gpt2": [SparsificationConfig(target_sparsity=0.5), UniformQuantizationConfig(bits=3)],
    "uneven": [
        SparsificationConfig(target_sparsity=0.5, target_modules=UNEVEN),
        SmolConfig(target_bits=3.0, group_size=5, target_modules=UNEVEN, seed=1),
    ],
    "uneven columns": [SparsificationConfig(target_sparsity=0.5, granularity="column", target_modules=UNEVEN)],
    "quantized inputs": [SmolConfig(target_bits=3.0, activations=True)],
    "frozen": [SparsificationConfig(target_sparsity=0.5, train_weights=False)],
    "frozen bits": [SmolConfig(target_bits=3.0, train_weights=False, train_scale=False)],
}
ROUNDED = ("quantized inputs", "frozen bits", "sparse bits", "bits of weights", "groups of gpt2", "uneven")
SUMMED = ("columns", "heads", "neurons", "uneven columns", "shared", *ROUNDED)
"""Those of whose numbers there are sums: over rows, over processes, or over weights that a whole model stacks."""
GPT2 = ("2:4", "groups of gpt2", "channels of gpt2")


def name_of(kind: str) -> str:
    return "gpt2" if kind in GPT2 else "bert"


def uneven() -> nn.Module:
    """Of 35 rows a process has 18, of one row none."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=35,
            max_position_embeddings=32,
            num_labels=1,
        )
    )


def model(kind: str) -> nn.Module:
    made = uneven().eval() if UNEVEN in str(METHODS[kind]) else build(name_of(kind)).eval()
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if kind == "fixed":
        stack = attach(made, UniformQuantizationConfig(bits=4, mode="round"))
        stack.finalize()
    return made


def train(kind: str, sharded: bool) -> dict[str, torch.Tensor]:
    """The final weights, and the numbers that were logged; nothing on processes that do not have them."""
    made = model(kind)
    stack = attach(made, METHODS[kind])
    if kind == "fixed":
        made.hf_quantizer.remove_quantization_config(made)
    twin = Unsharded(stack) if sharded else None
    if sharded:
        blocks = made.transformer.h if kind in GPT2 else made.bert.encoder.layer
        for block in blocks:
            fully_shard(block)
        fully_shard(made)
    optimizer = stack.bind(torch.optim.Adam(stack.parameters(), lr=1e-3), steps=STEPS)
    inputs = batch(name_of(kind))
    labels = inputs["input_ids"] if kind in GPT2 else torch.tensor([0, 1, 0, 1])
    if made.config.num_labels == 1:
        labels = labels.float()
    logged = []
    for _ in range(STEPS):
        with torch.no_grad():  # leaves parameters of the outermost group whole
            made.eval()(**inputs)
        made.train()(**inputs, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logged += stack.metrics().values()
    if twin is not None:
        if not twin.fill(stack):
            return {}
        made, stack = twin.model, twin.stack
    stack.bake()
    return {**made.state_dict(), "logged": torch.tensor(logged)}


def refusals() -> dict[str, str]:
    """What is said about what cannot be done with a sharded model."""
    made = model("magnitude")
    stack = attach(made, METHODS["magnitude"])
    fully_shard(made)
    other = fully_shard(model("magnitude"))
    said = {}
    tried = {
        "finalize": stack.finalize,
        "bake": stack.bake,
        "detach": stack.detach,
        "copy": lambda: Unsharded(stack),
        "attach": lambda: attach(other, METHODS["magnitude"]),
    }
    for name, act in tried.items():
        try:
            act()
        except ValueError as error:
            said[name] = str(error)
    return said


def main(path: str, *kinds: str) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    ended = {kind: train(kind, sharded=True) for kind in kinds or METHODS}
    refused = refusals()
    first = dist.get_rank() == 0
    dist.barrier()
    dist.destroy_process_group()
    if first:
        # Both processes saw the whole batch, so the averaged gradient was the gradient of one process.
        pairs = {kind: (ended[kind], train(kind, sharded=False)) for kind in ended}
        torch.save({**pairs, "refused": refused}, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
