"""What a training step costs with each method: time, operations and peak memory, relative to the dense step.

    python benchmarks/training_step.py                      # BERT with 4 layers, 8 x 128, on the CPU
    python benchmarks/training_step.py --device cuda --models bert llama mixture --compile

Each method is measured beside a dense model of its own, in turns: the ratio of every pair of steps is taken, and their
median and quartiles are printed. On a GPU the forward pass is autocast to bfloat16; AdamW is fused everywhere.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hf_approx import SharingConfig, SmolConfig, SparsificationConfig, attach
from hf_approx.methods import MethodConfig

MASKS = SparsificationConfig(target_sparsity=0.9)
BITS = SmolConfig(target_bits=4.0)
METHODS: dict[str, list[MethodConfig]] = {
    "masks": [MASKS],
    "noise": [BITS],
    "rounded": [SmolConfig(target_bits=4.0, noise_fraction=0.0)],
    "groups of 64": [SmolConfig(target_bits=4.0, group_size=64, scale_granularity="group")],
    "sharing": [SharingConfig(templates=0.5, init="layers")],
    "masks and noise": [MASKS, BITS],
}


class Model:
    """A model in training: its architecture, and the batch it trains on."""

    def __init__(self, name: str, device: str, scale: int, compiled: bool) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.plain = MODELS[name][0](scale, self.device.type).to(self.device)
        rows, width = MODELS[name][1][self.device.type]
        vocabulary = self.plain.config.vocab_size
        ids = torch.randint(0, vocabulary, (rows, width), device=self.device)
        labels = torch.randint(0, 2, (rows,), device=self.device) if name == "bert" else ids
        self.inputs = {"input_ids": ids, "labels": labels}
        self.model = torch.compile(self.plain) if compiled else self.plain

    def train(self, methods: list[MethodConfig] | None, steps: int) -> None:
        """Make the optimizer; with methods, put them to work."""
        if methods is None:
            self.optimizer: Any = torch.optim.AdamW(self.plain.parameters(), lr=1e-5, fused=True)
        else:
            stack = attach(self.plain, methods)
            # In the middle of the schedules: masks are soft, precisions are not fixed unless from the start.
            self.optimizer = stack.bind(torch.optim.AdamW(stack.parameters(), lr=1e-5, fused=True), steps=20 * steps)

    def step(self) -> None:
        """One step of training."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def bert(scale: int, device: str) -> nn.Module:
    """BERT-base; on a CPU with 4 layers."""
    layers = (12 if device == "cuda" else 4) * scale
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, attention_probs_dropout_prob=0.0))


def llama(scale: int, device: str) -> nn.Module:
    """300 million weights; on a CPU a tenth of that."""
    width, layers = (1024, 20 * scale) if device == "cuda" else (512, 6 * scale)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


def mixture(scale: int, device: str) -> nn.Module:
    """A small mixture of 8 experts, 2 of which work on a token."""
    width, layers = (512, 8 * scale) if device == "cuda" else (256, 4 * scale)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            num_local_experts=8,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )


MODELS: dict[str, tuple[Callable[[int, str], Any], dict[str, tuple[int, int]]]] = {
    "bert": (bert, {"cuda": (32, 128), "cpu": (8, 128)}),
    "llama": (llama, {"cuda": (8, 512), "cpu": (4, 128)}),
    "mixture": (mixture, {"cuda": (8, 512), "cpu": (4, 128)}),
}
"""How to build each, and the batch by device: rows and tokens."""


class Counter(TorchDispatchMode):
    """Counts operations dispatched, and how many bytes their results have that are new."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Model) -> float:
    """Seconds of one step."""
    wait(run.device)
    start = time.perf_counter()
    run.step()
    wait(run.device)
    return time.perf_counter() - start


def operations(run: Model) -> int:
    """Dispatched in one step."""
    with Counter() as counter:
        run.step()
    return counter.operations


def peak(run: Model, steps: int = 2) -> float:
    """Largest memory in use during a step, in bytes; of a GPU only."""
    if run.device.type != "cuda":
        return float("nan")
    wait(run.device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        run.step()
    wait(run.device)
    held = sum(p.numel() * p.element_size() for p in run.plain.parameters())
    return torch.cuda.max_memory_allocated() - before + held


def measure(options: argparse.Namespace, name: str, method: str, scale: int, compiled: bool) -> dict[str, Any]:
    """A dense model and one with a method, in turns."""
    runs = []
    entry: dict[str, Any] = {"model": name, "method": method, "scale": scale, "compiled": compiled}
    memory = []
    for configs in (None, METHODS[method]):
        gc.collect()
        free = torch.cuda.memory_allocated() if options.device == "cuda" else 0
        run = Model(name, options.device, scale, compiled)
        run.train(configs, options.rounds)
        start = time.perf_counter()
        run.step()
        wait(run.device)
        entry[f"first_step_{'dense' if configs is None else 'method'}"] = time.perf_counter() - start
        run.step()
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run.step()
            wait(run.device)
            memory.append(torch.cuda.max_memory_allocated() - free)
        runs.append(run)
    if not compiled:
        dense, ours = (operations(run) for run in runs)
        entry.update(operations_dense=dense, operations=ours)
    ratios, times = [], []
    for turn in range(options.rounds):
        pair = {run: timed(run) for run in (runs if turn % 2 else reversed(runs))}
        times.append(pair[runs[0]])
        ratios.append(pair[runs[1]] / pair[runs[0]])
    low, _, high = quantiles(ratios, n=4)
    entry.update(dense_seconds=median(times), ratio=median(ratios), quartiles=[low, high])
    if memory:
        entry.update(memory_dense=memory[0], memory_ratio=memory[1] / memory[0])
    entry["weights"] = sum(p.numel() for p in runs[0].plain.parameters())
    return entry


def row(entry: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = entry["quartiles"]
    cells = [
        entry["model"] + (f" x {entry['scale']}" if entry["scale"] > 1 else ""),
        entry["method"] + (", compiled" if entry["compiled"] else ""),
        f"{entry['dense_seconds'] * 1e3:.1f} ms",
        f"{entry['ratio']:.2f} ({low:.2f} to {high:.2f})",
        f"{entry['operations'] / entry['operations_dense']:.2f}" if "operations" in entry else "",
        f"{entry['memory_ratio']:.2f}" if "memory_ratio" in entry else "",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print; every row is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--models", nargs="+", default=["bert"], choices=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scales", nargs="+", type=int, default=[1], help="How many times the layers.")
    parser.add_argument("--rounds", type=int, default=10, help="Pairs of steps.")
    parser.add_argument("--compile", action="store_true", help="Compiled models too.")
    parser.add_argument("--output", type=Path, help="JSON lines.")
    options = parser.parse_args()
    kind = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {options.device}, {kind}, seed 0, {options.rounds} pairs of steps\n")
    print("| model | method | dense step | ratio (quartiles) | operations | peak memory |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in options.models:
        for scale in options.scales:
            for compiled in [False, True] if options.compile else [False]:
                for method in options.methods:
                    entry = measure(options, name, method, scale, compiled)
                    print(row(entry), flush=True)
                    if options.output is not None:
                        with options.output.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
