"""Shared by tests: short training runs and fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_approx import ApproxTrainer
from models import build, dataset

ROOT = Path(__file__).parent.parent


def arguments(folder, **options):
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def make_trainer(name, folder, approx=(), model=None, optimizer=None, size=32, eval_dataset=None, **options):
    return ApproxTrainer(
        model=model or build(name),
        args=arguments(folder, **options),
        train_dataset=dataset(name, size),
        eval_dataset=eval_dataset,
        approx=approx,
        optimizer=optimizer,
    )


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


def python(code, *args, check=True, **env):
    """Run Python code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        check=check,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1", **env},
    )
