"""Train with several methods, in parallel and sharded, and resume in the middle; write what each run ended with.

accelerate turns FSDP on for accelerators only. What it would set in its state is set here, and its FSDP2 code runs
on gloo.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import arguments
from hf_approx import (
    ApproxTrainer,
    AvaGradConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
)
from models import build, dataset
from sharing import deep_bert

SPARSE = SparsificationConfig(target_sparsity=0.8)
METHODS = {
    "sparse": [SPARSE],
    "smol": [SmolConfig(target_bits=3.0, group_size=16, activations=True)],
    "shared": [SharingConfig(templates=0.5, recurrence=0.1), replace(SPARSE, target_modules=r".*hf_approx_banks.*")],
    "best": [
        SparsificationConfig(target_sparsity=0.5, granularity="column", soft_fraction=0.5, mask_lr=0.05),
        UniformQuantizationConfig(bits=4, scale_granularity="group", group_size=10),
    ],
}
# The first checkpoint is the better one: it is loaded in the end, over what was trained since.
BEST = {
    "load_best_model_at_end": True,
    "greater_is_better": False,
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "eval_steps": 4,
    "gradient_accumulation_steps": 2,
}


class Sharded(ApproxTrainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["BertLayer"],
            state_dict_type="FULL_STATE_DICT" if "smol" in self.args.output_dir else "SHARDED_STATE_DICT",
        )
        self.is_fsdp_enabled = True


def trainer(cls, kind, folder, processes):
    model = deep_bert() if kind == "shared" else build("bert")
    if kind != "smol":  # whose own parameters are float32, and FSDP wants one dtype
        model = model.double()  # sums in another order must not swap weights of equal score
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made = cls(
        model=model,
        args=arguments(
            folder,
            per_device_train_batch_size=(4 if kind == "best" else 8) // processes,
            save_strategy="steps",
            save_steps=4,
            average_tokens_across_devices=False,  # BERT's loss is a mean over the batch whatever it is told
            train_sampling_strategy="sequential",
            **(BEST if kind == "best" else {}),
        ),
        train_dataset=dataset("bert"),
        eval_dataset=dataset("bert", 16, seed=1),
        approx=METHODS[kind],
        optimizer=AvaGradConfig(lr=0.01, weight_decay=0.01),
        store_dtype="float32",
    )
    assert made.args.world_size == processes, made.args.world_size
    return made


def run(cls, kind, folder, processes, resume=True):
    straight = trainer(cls, kind, folder / "run", processes)
    straight.train()
    if kind == "best":
        assert straight.state.best_model_checkpoint.endswith("checkpoint-4"), straight.state.log_history
    sharded = sum(isinstance(param, DTensor) for param in straight.model.parameters())
    assert (sharded > 0) == (cls is Sharded), sharded
    report = straight.approx_report.copy()  # the first process adds to its own what the card says
    loss = straight.evaluate()["eval_loss"]
    straight.save_model(str(folder / "model"))
    ended = {"totals": report["totals"], "methods": report["methods"], "loss": loss}
    (folder / f"rank{straight.args.process_index}.json").write_text(json.dumps(ended))
    if resume:
        resumed = trainer(cls, kind, folder / "run", processes)
        resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-4"))
        resumed.save_model(str(folder / "resumed"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in METHODS:
        run(Sharded, kind, Path(sys.argv[1]) / "sharded" / kind, 2)
    for kind in ("smol", "shared"):
        run(ApproxTrainer, kind, Path(sys.argv[1]) / "parallel" / kind, 2)
