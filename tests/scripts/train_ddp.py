"""Train a tiny BERT on the global batch, whatever the number of processes; write what each process ended with."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from transformers import TrainerCallback

from helpers import make_trainer
from hf_approx import AvaGradConfig, SmolConfig, SparsificationConfig
from models import build


class KillOne(TrainerCallback):
    """One process ends in mid-run, without a word."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


folder = Path(sys.argv[1])
model = build("bert").double()  # sums in another order must not swap weights of equal score
for module in model.modules():
    if isinstance(module, nn.Dropout):
        module.p = 0.0
processes = int(sys.argv[2])
approx = [SparsificationConfig(target_sparsity=0.8)]
if "layer" in sys.argv:
    approx = [SparsificationConfig(granularity="layer", target_sparsity=0.5)]
if "smol" in sys.argv:
    approx.append(SmolConfig(target_bits=3.0, group_size=16, activations=True))
trainer = make_trainer(
    "bert",
    folder / "run",
    approx=approx,
    optimizer=AvaGradConfig(lr=0.01, weight_decay=0.01),
    model=model,
    per_device_train_batch_size=8 // processes,
    save_strategy="steps",
    save_steps=4,
    average_tokens_across_devices=False,  # BERT's loss is a mean over the batch whatever it is told
    train_sampling_strategy="sequential",
)
assert trainer.args.world_size == processes, trainer.args.world_size
if "kill" in sys.argv:
    trainer.add_callback(KillOne())
trainer.evaluate(trainer.train_dataset)  # accelerate must not take the model for prepared after this
checkpoint = str(folder / "run" / "checkpoint-4") if "resume" in sys.argv else None
trainer.train(resume_from_checkpoint=checkpoint or "resume_last" in sys.argv)
report = json.dumps(trainer.approx_report)  # the first process adds to its own what the card says
trainer.save_model(str(folder / "model"))
rank = trainer.args.process_index
torch.save(trainer.model.state_dict(), folder / f"rank{rank}.pt")
(folder / f"rank{rank}.json").write_text(report)
