"""AvaGrad on parameters sharded over two processes by `fully_shard`; rank 0 writes the full weights."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_approx import AvaGrad


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(model: nn.Module) -> None:
    optimizer = AvaGrad(model.parameters(), lr=0.05, eps=1e-3, weight_decay=0.01)
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def main(path: str) -> None:
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    model = build()
    fully_shard(model[0])
    fully_shard(model)
    # Both processes see the whole batch, so the averaged gradient is the gradient of one process.
    train(model)
    full = {name: param.full_tensor() for name, param in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save(full, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
