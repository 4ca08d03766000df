"""Search from four initial scores, shared out over the processes of the launch; write what each process got."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hf_approx import SparsificationConfig
from hf_approx.loops import Ticket, TicketConfig, TicketSearch, search_in_parallel

torch.set_num_threads(1)
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == processes, accelerator.num_processes
generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 8, generator=generator)
y = (x[:, 0] * x[:, 1] > 0).long()


def search(initial_score: float) -> Ticket:
    torch.manual_seed(0)
    method = SparsificationConfig(
        preset="paper",
        soft_fraction=1.0,
        target_sparsity=None,
        target_modules=["0", "2"],
        initial_score=initial_score,
        penalty=1e-3,
        mask_lr=0.05,
    )
    return TicketSearch(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)),
        TicketConfig(method=method, rounds=2, epochs=2),
        DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True),
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        lambda params: (torch.optim.SGD(params, lr=0.1), None),
        lambda model: -float(nn.functional.cross_entropy(model(x), y)),
        checkpoint=folder / str(initial_score),
    ).run()


tickets = search_in_parallel(search, [-0.1, 0.0, 0.05, 0.1], accelerator)
assert accelerator.num_processes == processes, accelerator.num_processes
path = folder / f"rank{accelerator.process_index}.json"
path.write_text(json.dumps([[score, asdict(ticket)] for score, ticket in tickets.items()]))
accelerator.end_training()
