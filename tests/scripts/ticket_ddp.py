"""Search with a tiny BERT on the global batch, whatever the number of processes; then train its ticket once more."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import arguments
from hf_approx import SparsificationConfig, TicketConfig, TicketTrainer
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, resume in (("straight", False), ("resumed", True)):
        trainer = search(folder / "run", 2, resume)
        torch.save(trainer.model.state_dict(), folder / f"{name}-{trainer.args.process_index}.pt")
