"""Settle a budget of bits that zeros put out of reach, on every process."""

import torch
from accelerate import PartialState
from torch import nn

from hf_approx import SmolConfig, attach

if __name__ == "__main__":
    torch.set_num_threads(1)
    assert PartialState(cpu=True).num_processes == 2
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[0].weight.data[:, ::2] = 0
    attach(model, SmolConfig(target_modules=["0", "1"], target_bits=2.5, granularity="tensor")).settle()
