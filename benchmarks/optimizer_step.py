"""Time of one AvaGrad step against AdamW's, measured in turns, and bytes of state; prints a Markdown table.

python benchmarks/optimizer_step.py
"""

import argparse
import time
from statistics import median

import torch
from torch import nn

from hf_approx import AvaGrad

SIZES = [(30522, 384)] + 6 * ([(384, 384)] * 4 + [(1536, 384), (384, 1536)] + [(384,)] * 9)
"""Shapes of MiniLM-L6: 22.6 million weights."""


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors an optimizer keeps."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    params = [nn.Parameter(0.02 * torch.randn(size, device=options.device)) for size in SIZES]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    optimizers = {
        "AdamW, fused": torch.optim.AdamW(params, fused=True),
        "AdamW, foreach": torch.optim.AdamW(params, foreach=True),
        "AvaGrad": AvaGrad(params, eps=1e-4),
        "AvaGrad, single tensor": AvaGrad(params, eps=1e-4, foreach=False),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(options.rounds + 2):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if options.device != "cpu":
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - start)
    weights = sum(param.numel() for param in params)
    reference = median(times["AdamW, foreach"][2:])
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads, {weights:,} weights\n")
    print("| optimizer | step, relative to AdamW foreach | bytes of state a weight |")
    print("| --- | --- | --- |")
    for name, optimizer in optimizers.items():
        ratio = median(times[name][2:]) / reference
        print(f"| {name} | {ratio:.2f} | {state_bytes(optimizer) / weights:.1f} |")


if __name__ == "__main__":
    main()
