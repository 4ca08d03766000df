"""The files that a training goes on from: whether they are there, whole, and of one step."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "approx_state.json"
"""What `Trainer` does not write: the state of the methods, and of which files and step this checkpoint is."""

WEIGHTS = "*.safetensors"
OPTIMIZERS = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0")
"""Of one device, and what accelerate writes of a sharded one: a file, or a folder of pieces."""


def written_files(trainer: Trainer, checkpoint: Path) -> list[str]:
    """Names of the files that this run wrote into a checkpoint on all processes and goes on from."""
    count = trainer.args.world_size
    return [
        *sorted(path.name for path in checkpoint.glob(WEIGHTS)),
        *(name for name in OPTIMIZERS if (checkpoint / name).is_file()),
        SCHEDULER_NAME,
        *([SCALER_NAME] if _scales(trainer) else []),
        *(_random_numbers(count, index) for index in range(count)),
    ]


def fingerprints(checkpoint: Path, names: Iterable[str]) -> dict[str, str]:
    """Of those files that are there: a file of another step has another one."""
    return {name: _fingerprint(checkpoint / name) for name in names if (checkpoint / name).is_file()}


def check_files(trainer: Trainer, checkpoint: Path) -> None:
    """Raise `ValueError`, naming the file, unless this run goes on from a checkpoint exactly as it was left.

    Of a checkpoint that was written before its files were noted in `approx_state.json`, only that they are there and
    whole is known.
    """
    if trainer.is_deepspeed_enabled:
        return
    optimizer = next((name for name in OPTIMIZERS if (checkpoint / name).exists()), None)
    random = _random_numbers(trainer.args.world_size, trainer.args.process_index)
    if optimizer is None and not (checkpoint / SCHEDULER_NAME).exists() and not any(checkpoint.glob("rng_state*.pth")):
        raise ValueError(
            f"Cannot resume: '{checkpoint}' holds the model alone, as save_only_model=True makes them; start a new "
            "training from it, or resume from a checkpoint with its optimizer."
        )
    if optimizer is None:
        raise _missing(checkpoint / OPTIMIZER_NAME, "the optimizer would start anew")
    if not (checkpoint / SCHEDULER_NAME).is_file():
        raise _missing(checkpoint / SCHEDULER_NAME, "the learning rate would start anew")
    if not (checkpoint / random).is_file():
        found = len(list(checkpoint.glob("rng_state*.pth")))
        other = f" and the checkpoint has those of {found} others" if found else ""
        raise _missing(checkpoint / random, f"the random numbers of this process would be others{other}")
    noted, scaled = read_state(checkpoint), (checkpoint / SCALER_NAME).is_file()
    if _scales(trainer) and not scaled:
        raise _missing(checkpoint / SCALER_NAME, "the scale of fp16 gradients would start anew")
    if not _scales(trainer) and scaled and SCALER_NAME in noted.get("files", (SCALER_NAME,)):
        raise ValueError(f"Cannot resume: '{checkpoint}' was trained with fp16, this run is not; set fp16=True.")
    _check_steps(checkpoint, noted.get("step"))
    files = noted.get("files", {})
    needed = [optimizer, SCHEDULER_NAME, random, *([SCALER_NAME] if scaled else [])]
    weights = {path.name for path in checkpoint.glob(WEIGHTS)} | {name for name in files if Path(name).match(WEIGHTS)}
    for path in (checkpoint / name for name in (*needed, *sorted(weights))):
        if path.is_dir():
            continue
        if not path.is_file():
            raise _missing(path, "weights would be others")
        if _fingerprint(path) != files.get(path.name, _fingerprint(path)):
            raise ValueError(f"Cannot resume: '{path}' is not the file that was written with this checkpoint.")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `STATE_FILE` says; nothing if there is none.

    Raises:
        ValueError: It is damaged.
    """
    path = checkpoint / STATE_FILE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("methods"), list):
            raise ValueError("it does not say which methods there were")
    except ValueError as error:
        raise _damaged(path, error) from None
    return state


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint; -1 if it has none."""
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: `Trainer` writes its own state last."""
    try:
        return isinstance(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def complete_checkpoints(run: Path) -> list[Path]:
    """Those in the folder of a run that were written to their end, the last step last."""
    found = (path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0 and is_complete(path))
    return sorted(found, key=step_of)


def check_whole(path: Path) -> None:
    """Raise `ValueError` unless a file that `torch.save` wrote is there and not cut off."""
    if not path.is_file():
        raise _missing(path, "there is nothing to go on from")
    _fingerprint(path)


def _check_steps(checkpoint: Path, noted: int | None) -> None:
    """Raise `ValueError` unless the name of a checkpoint and both files that tell its step agree."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    steps = {TRAINER_STATE_NAME: state.get("global_step"), STATE_FILE: noted}
    if noted is None or steps[TRAINER_STATE_NAME] == noted:
        return
    wrong = STATE_FILE if steps[TRAINER_STATE_NAME] == step_of(checkpoint) else TRAINER_STATE_NAME
    right = noted if wrong == TRAINER_STATE_NAME else steps[TRAINER_STATE_NAME]
    raise ValueError(
        f"Cannot resume: '{checkpoint / wrong}' is of step {steps[wrong]}, and the rest of the checkpoint of step "
        f"{right}."
    )


BLOCK, BLOCKS = 1 << 12, 256
"""Bytes, and how many runs of so many, that stand for a file of weights: a step moves weights everywhere in it."""


def _fingerprint(path: Path) -> str:
    """Of weights from their header and parts of them, of what `torch.save` wrote from the checksums in it.

    Raises:
        ValueError: The file is cut off, or no such file.
    """
    digest = hashlib.sha256()
    try:
        if path.match(WEIGHTS):
            with safe_open(path, framework="pt"):  # which checks the header, and the size of the file
                pass
            size = path.stat().st_size
            with open(path, "rb") as file:
                for start in range(0, size, max(size // BLOCKS, BLOCK)):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
        else:
            with zipfile.ZipFile(path) as archive:
                parts = [[part.filename, part.file_size, part.CRC] for part in archive.infolist()]
            digest.update(json.dumps(parts).encode())
    except (zipfile.BadZipFile, SafetensorError) as error:
        raise _damaged(path, error) from None
    return digest.hexdigest()


def _scales(trainer: Trainer) -> bool:
    return getattr(trainer.accelerator, "scaler", None) is not None


def _random_numbers(processes: int, index: int) -> str:
    return "rng_state.pth" if processes <= 1 else f"rng_state_{index}.pth"


def _missing(path: Path, effect: str) -> ValueError:
    return ValueError(f"Cannot resume: '{os.fspath(path)}' is missing, so {effect}; resume from another checkpoint.")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"Cannot resume: '{path}' is damaged ({error}); resume from another checkpoint.")
