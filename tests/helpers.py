"""Shared by tests: short training runs and fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from transformers import TrainerCallback, TrainingArguments

from fresh import ALL, Forks, job
from hf_approx import ApproxTrainer, attach
from hf_approx.checkpoint.checksums import config_checksum, entry_checksum
from hf_approx.methods.latent import latent_of
from hf_approx.targets import LATENTS, Target, select_targets
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


def stacked(model, *configs):
    """Methods put to work on a model: their stack and, after it, each of them."""
    stack = attach(model, configs)
    return (stack, *stack.methods)


def trained_weight(module):
    """What is trained in the place of a module's weight, or the weight itself."""
    latent = latent_of(Target("", module))
    return module.weight if latent is None else latent.weight


def every_latent(model):
    """What is trained in the place of a model's parameters."""
    return [latent for module in model.modules() for latent in (vars(module).get(LATENTS) or {}).values()]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trained(model):
    """Its state with what is trained in the place of weights under their names, and what methods keep beside that."""
    state = weights(model)
    for latent in every_latent(model):
        state.update((name, tensor.detach().clone()) for name, tensor in latent.tensors())
    return state


def target_modules(model, *patterns, **options):
    """The modules of the targets, by key."""
    return {key: target.module for key, target in select_targets(model, *patterns, **options).items()}


def edit_packing(folder, change):
    """Change the packing part of a saved config, with checksums that fit what it says then."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    data = config["quantization_config"]
    cover(data)
    change(data)
    cover(data)
    data["checksum"] = config_checksum(data)
    path.write_text(json.dumps(config))


def cover(data):
    """From the checksums of bytes to those of bytes and entries, and back."""
    tensors = data.get("tensors")
    for name, entry in tensors.items() if isinstance(tensors, dict) else ():
        if isinstance(entry, dict) and "crc32" in entry:
            entry["crc32"] = entry_checksum(name, entry, entry["crc32"])


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []


class SimulatedCrashError(Exception):
    """Raised in mid-training."""


class CrashAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise SimulatedCrashError


def assert_resumes_after_crash(trainer, folder, crash):
    """A run that dies one step after checkpoint `crash` goes on to what an unbroken run ends with; returns that run.

    `trainer(folder)` makes one that saves at every step.
    """
    straight = trainer(folder / "straight")
    straight.train()
    crashed = trainer(folder / "crashed")
    crashed.add_callback(CrashAt(crash + 1))
    with pytest.raises(SimulatedCrashError):
        crashed.train()
    resumed = trainer(folder / "crashed")
    resumed.train(resume_from_checkpoint=str(folder / "crashed" / f"checkpoint-{crash}"))
    assert_same_weights(weights(resumed.model), weights(straight.model))
    assert resumed.approx_report == straight.approx_report
    return straight


FORKS = Forks(ALL)


def python(code, *args, check=True, cwd=None, **env):
    """Run Python code in a fresh process; what it printed is the message of a failure."""
    (result,) = FORKS.run([job(code, *args, env={**os.environ, "HF_HUB_OFFLINE": "1", **env}, cwd=cwd)])
    return checked(result) if check else result


def launch(script, *args, processes=1, check=True, timeout=500, launcher=False):
    """Run a script on the CPU as `accelerate launch` does, in fresh processes; their output comes together.

    Args:
        launcher: Start accelerate's own launcher, which starts processes that import everything again.
    """
    config = ROOT / "recipes" / "accelerate" / ("cpu.yaml" if processes == 1 else "cpu_2_processes.yaml")
    # Port 0 would be a port that is free now and may be another's seconds later, when it is listened on. Those below
    # the range of outgoing connections stay free, and every test process has its own.
    port = 20000 + os.getpid() % 10000
    command = ["--main_process_port", str(port), "--config_file", str(config), *map(str, [script, *args])]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if launcher:
        result = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *command],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            env={**os.environ, **own},
        )
        return checked(result) if check else result
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    env = prepare_multi_gpu_env(options) if processes > 1 else prepare_simple_launcher_cmd_env(options)[1]
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, **world} if processes > 1 else {}
        jobs.append(job(Path(script), *args, env={**env, **own, **{name: str(ranks[name]) for name in ranks}}))
    ended = FORKS.run(jobs, timeout)
    outputs = ("".join(getattr(each, name) for each in ended) for name in ("stdout", "stderr"))
    result = subprocess.CompletedProcess(command, next((e.returncode for e in ended if e.returncode), 0), *outputs)
    return checked(result) if check else result


def checked(result):
    if result.returncode:
        pytest.fail(f"{result.args} ended with {result.returncode}:\n{result.stdout[-3000:]}\n{result.stderr[-9000:]}")
    return result
