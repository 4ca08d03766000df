"""Time of one AvaGrad step against AdamW's, SGD's and another AvaGrad's, measured in turns; prints a Markdown table.

python benchmarks/optimizer_step.py --sizes 22M 109M 1.1B --json step.json

Each round lets every optimizer step once, on the same weights; a ratio is that of two times of one round, so other
load on the machine falls on both. AdamW and SGD share moments to save memory. Each AvaGrad has its own: had another
optimizer written to them, it would have to compute its norm again.
"""

import argparse
import json
import os
import time
from pathlib import Path
from statistics import quantiles
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from hf_approx import AvaGrad
from hf_approx.optim import native

Shapes = list[tuple[int, ...]]


def encoder(layers: int, width: int, vocabulary: int = 30522) -> Shapes:
    """Shapes of BERT's weights."""
    layer: Shapes = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width), (4 * width,), *[(width,)] * 9]
    return [(vocabulary, width), (512, width), (2, width), (width,), (width,), *(layers * layer)]


def decoder(layers: int, width: int, hidden: int, key_width: int, vocabulary: int = 32000) -> Shapes:
    """Shapes of Llama's weights."""
    attention: Shapes = [(width, width), (key_width, width), (key_width, width), (width, width)]
    layer: Shapes = [*attention, (hidden, width), (hidden, width), (width, hidden), (width,), (width,)]
    return [(vocabulary, width), (vocabulary, width), (width,), *(layers * layer)]


SIZES = {
    "22M": encoder(6, 384),
    "109M": encoder(12, 768),
    "1.1B": decoder(22, 2048, 5632, 256),
}
"""The shapes of MiniLM-L6, BERT-base and TinyLlama."""

BYTES = 48
"""For each weight: itself, its gradient, four pairs of moments, what AdamW's multi-tensor form needs besides."""


def available(device: str) -> int:
    """Bytes of free memory."""
    if device == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") + _cached()
    return torch.cuda.mem_get_info()[0]


def _cached() -> int:
    """Bytes Linux gives back when they are asked for."""
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines() if memory.exists() else []
    free = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return max(free.get("MemAvailable", 0) - free.get("MemFree", 0), 0)


class Uncompiled(AvaGrad):
    """In the multi-tensor form, which a machine without a compiler takes."""

    def step(self, *arguments: Any) -> Any:
        """Take one step."""
        with patch.object(native, "takes", lambda batch: False):
            return super().step(*arguments)


def build(params: list[nn.Parameter]) -> dict[str, torch.optim.Optimizer]:
    """The optimizers to compare, the one the ratios are of first; what is missing is said."""
    optimizers: dict[str, torch.optim.Optimizer] = {
        "AdamW, fused": torch.optim.AdamW(params, lr=1e-5, fused=True),
        "AdamW, foreach": torch.optim.AdamW(params, lr=1e-5, foreach=True),
        "SGD with momentum": torch.optim.SGD(params, lr=1e-5, momentum=0.9),
        "AvaGrad": AvaGrad(params, lr=1e-5, eps=1e-4),
        "AvaGrad, not compiled": Uncompiled(params, lr=1e-5, eps=1e-4),
    }
    try:
        from pytorch_optimizer import AvaGrad as OtherAvaGrad

        optimizers["AvaGrad of pytorch_optimizer"] = OtherAvaGrad(params, lr=1e-5, eps=1e-4)
    except ImportError:
        print("pytorch_optimizer is not installed, so its AvaGrad is left out.\n")
    return optimizers


def give_moments(optimizers: dict[str, torch.optim.Optimizer], params: list[nn.Parameter]) -> None:
    """Let every optimizer have its second step next."""
    for param in params:
        mean, square = torch.zeros_like(param), torch.rand_like(param).mul_(1e-6)
        for name, optimizer in optimizers.items():
            if name.startswith("AvaGrad"):
                mean, square = torch.zeros_like(param), torch.rand_like(param).mul_(1e-6)
            if name.startswith("SGD"):
                optimizer.state[param] = {"momentum_buffer": mean}
            elif name.startswith("AdamW"):
                step = torch.ones((), device=param.device if "fused" in name else "cpu")
                optimizer.state[param] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
            elif isinstance(optimizer, AvaGrad):
                optimizer.state[param] = {"step": 1, "exp_avg": mean, "exp_avg_sq": square}
            else:
                optimizer.state[param] = {"exp_avg": mean, "exp_avg_sq": square}
    for name, optimizer in optimizers.items():
        if "pytorch_optimizer" in name:
            for group in optimizer.param_groups:
                group.update(step=1, gamma=1.0)


def measure(size: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table: an optimizer's time a step, and the quartiles of its ratios to the first."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in SIZES[size]]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    optimizers = build(params)
    give_moments(optimizers, params)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(rounds + 2):
        # Every other round backwards: whoever comes after another finds the caches as that one left them.
        for name, optimizer in list(optimizers.items())[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            optimizer.step()
            if device != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))[2:]
    weights = sum(param.numel() for param in params)
    rows = []
    for name, all_taken in times.items():
        taken = all_taken[2:]
        low, middle, high = quantiles([one / other for one, other in zip(taken, first, strict=True)], n=4)
        seconds = quantiles(taken, n=4)[1]
        rows.append(
            {"size": size, "weights": weights, "optimizer": name, "milliseconds": 1e3 * seconds}
            | {"ratio": middle, "ratio_low": low, "ratio_high": high, "nanoseconds_a_weight": 1e9 * seconds / weights}
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="Write the rows to this file too.")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads\n")
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        needed, free = BYTES * sum(torch.Size(shape).numel() for shape in SIZES[size]), available(options.device)
        if needed > free:
            print(f"{size} is left out: it needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free.\n")
            continue
        rows += measure(size, options.device, options.rounds)
    print("| weights | optimizer | ms a step | ratio to AdamW fused: median (quartiles) | ns a weight |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        spread = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
        print(
            f"| {row['weights']:,} | {row['optimizer']} | {row['milliseconds']:.2f} | {spread} "
            f"| {row['nanoseconds_a_weight']:.2f} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
