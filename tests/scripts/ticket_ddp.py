"""Search with a tiny BERT on the global batch, whatever the number of processes; then train its ticket once more.

Also train what each process has begun with otherwise, in a loop of its own.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import arguments
from hf_approx import SharingConfig, SmolConfig, SparsificationConfig, TicketConfig, TicketTrainer, attach
from models import build, dataset


def search(folder: Path, processes: int, resume: bool = False) -> TicketTrainer:
    model = build("bert").double()  # sums in another order must not swap weights of equal score
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    args = arguments(
        folder,
        max_steps=4,
        save_strategy="steps",
        per_device_train_batch_size=8 // processes,
        average_tokens_across_devices=False,  # BERT's loss is a mean over the batch whatever it is told
        train_sampling_strategy="sequential",
    )
    assert args.world_size == processes, args.world_size
    method = SparsificationConfig(preset="paper", soft_fraction=1.0, target_sparsity=0.8, mask_lr=0.05)
    trainer = TicketTrainer(
        model=model,
        args=args,
        train_dataset=dataset("bert"),
        eval_dataset=dataset("bert", 16, seed=1),
        search=TicketConfig(method=method, rounds=2, rewind_step=2),
        store_dtype="float32",
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class Network(nn.Module):
    """A few layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def loop(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = Network()
    sharing = SharingConfig(groups={"bank": r"layers\.[024]"}, templates=2)
    mask = SparsificationConfig(target_sparsity=0.5, target_modules=["layers.6"])
    stack = attach(model, [sharing, mask, SmolConfig(target_bits=4.0, target_modules=["layers.6"])])
    optimizer = stack.bind(torch.optim.SGD(stack.parameters(), lr=0.1), steps=6)
    prepared, optimizer = Accelerator().prepare(model, optimizer)
    stack.begin()
    for _ in range(6):
        prepared(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    stack.bake()
    return model.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, resume in (("straight", False), ("resumed", True)):
        trainer = search(folder / "run", 2, resume)
        rank = trainer.args.process_index
        torch.save(trainer.model.state_dict(), folder / f"{name}-{rank}.pt")
    torch.save(loop(seed=rank), folder / f"loop-{rank}.pt")
