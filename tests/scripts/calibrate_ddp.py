"""Calibrate tiny models on the global batch, whatever the number of processes; write what each process measured."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent.parent))

from hf_approx import SmolConfig
from hf_approx.loops import calibrate
from models import VOCAB, build

KINDS = ("tokens", "classes", "numbers")
HELD_OUT = 13
"""No whole number of batches, whatever the number of processes."""


def examples(size: int, seed: int, shortest: int) -> list[dict[str, torch.Tensor]]:
    """Of different lengths, padded to 10."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (size, 10), generator=generator)
    lengths = torch.randint(shortest, 11, (size, 1), generator=generator)
    masks = (torch.arange(10) < lengths).long()
    return [{"input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)]


def measure(kind: str, processes: int) -> dict[str, Any]:
    """The numbers of a calibration and the model's weights afterwards."""
    model: Any = build("gpt2" if kind == "tokens" else "bert").double()
    model = model.bert if kind == "numbers" else model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight.mul_(10)
    # Each process averages over its own tokens in training: only equal lengths make that the mean of the whole batch.
    loader, held_out = DataLoader(examples(32, 0, 10), 8 // processes), DataLoader(examples(HELD_OUT, 1, 2), 4)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes, accelerator.num_processes
    config = SmolConfig(target_bits=3.0, group_size=16)
    result = calibrate(model, loader, config, steps=4, held_out=held_out, accelerator=accelerator)
    assert result.rounded is not None
    assert result.calibrated is not None
    return {"rounded": asdict(result.rounded), "calibrated": asdict(result.calibrated), "model": model.state_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    measured = {kind: measure(kind, 2) for kind in KINDS}
    torch.save(measured, Path(sys.argv[1]) / f"rank{Accelerator().process_index}.pt")
