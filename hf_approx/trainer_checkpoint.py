"""Checkpoints of a training that compresses: what is in them, and resuming from them exactly."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_approx.checkpoint import ApproxConfig, keep_own_names, unfinished_allowed
from hf_approx.files import torch_writes, write_text
from hf_approx.layout import CARD_FILE, is_ours
from hf_approx.logs import get_logger
from hf_approx.methods import Method, MethodStack
from hf_approx.methods.layers import BlockMask
from hf_approx.model_folder import weight_files
from hf_approx.modules.bank import shared_layers
from hf_approx.report import Recorder
from hf_approx.staging import recover, staged
from hf_approx.targets import Target
from hf_approx.trainer_divergence import DivergenceMixin
from hf_approx.trainer_files import (
    STATE_FILE,
    check_files,
    complete_checkpoints,
    fingerprints,
    is_complete,
    read_state,
    written_files,
)
from hf_approx.trainer_hub import HubMixin, remove_report

logger = get_logger(__name__)

LATENT_PREFIX = "hf_approx_training."
"""What the names of tensors begin with, in a checkpoint to resume from, that are in no state dict of the model."""


class CheckpointMixin(DivergenceMixin, HubMixin):
    """The part of `ApproxTrainerMixin` that saves and resumes."""

    methods: Sequence[Method]
    stack: MethodStack
    _repack: list[str]
    _special: bool
    _recorder: Recorder
    _checkpointing = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class in which `Trainer` would hide what this part and those beside it do."""
        super().__init_subclass__(**kwargs)
        ahead = [base for base in cls.__mro__[: cls.__mro__.index(CheckpointMixin)] if issubclass(base, Trainer)][1:]
        if Trainer in ahead:
            raise TypeError(
                f"{cls.__name__}: ApproxTrainerMixin comes before the trainer among the bases: write "
                f"class {cls.__name__}(ApproxTrainerMixin, {ahead[0].__name__})."
            )

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """No checkpoint is best before the compressed structure is settled: early ones are still dense."""
        if not all(method.is_final or method.after_training for method in self.methods):
            return False
        return super()._determine_best_metric(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        trainer = cast(Trainer, self)
        folder = Path(output_dir or trainer.args.output_dir or ".")
        # A checkpoint to resume from has a mark of its own that it is whole.
        if self._checkpointing or not trainer.args.should_save:
            self._write(folder, state_dict)
            return
        with staged(folder) as partial:
            if (folder / CARD_FILE).is_file() and not is_ours(folder / CARD_FILE):
                shutil.copy2(folder / CARD_FILE, partial)
            self._write(partial, state_dict)

    def _write(self, folder: Path, state_dict: dict[str, Tensor] | None) -> None:
        """Write all that belongs to the model into a folder."""
        trainer, model = cast(Trainer, self), self._plain_model
        if self._unfinished and not self._checkpointing:
            logger.warning("Training has not ended: what is saved is no model yet, and nothing can load it as one.")
        if self._unfinished and isinstance(model, PreTrainedModel):
            # An empty tensor under each weight's plain name makes any attempt to load this as a model fail on its
            # shape, in processes without hf_approx too, instead of starting from random weights.
            state = model.state_dict() if state_dict is None else state_dict
            # Those of a sharded model are written beside it, in pieces.
            own = self.stack.tensors() if self._twin is None else {}
            # Numbers that stages have in common would be taken for tied weights.
            latents = {
                f"{LATENT_PREFIX}{name}": tensor if tensor.dim() else tensor.clone() for name, tensor in own.items()
            }
            latents.update({f"{LATENT_PREFIX}{name}": state[name] for name in self._carriers()})
            names = [*self._plain_names(), *self._carriers()]
            state = {**state, **latents, **{name: torch.empty(0) for name in names}}
            model.config.quantization_config = ApproxConfig(training=True)
            keep_own_names(model)
            try:
                with unfinished_allowed():
                    super()._save(str(folder), state)  # type: ignore[misc]
            finally:
                del model.config.quantization_config
        else:
            with self._finished_as_model():
                super()._save(str(folder), state_dict)  # type: ignore[misc]
        if trainer.args.should_save:
            self._save_arguments(folder)
            remove_report(folder)
            if not self._unfinished and not trainer.is_in_train:
                self._save_report(folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of `Trainer`; a sharded model is saved by the first process once it is finished.

        What training goes on from is written elsewhere, so that an unfinished one is not gathered here.

        Raises:
            NotFiniteError: A weight is NaN or infinite. Nothing is written.
        """
        trainer = cast(Trainer, self)
        self.refuse_diverged(everywhere=False)
        if self._twin is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        if trainer.args.should_save:
            self._save(output_dir, {} if self._unfinished else None)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)

    def _plain_names(self) -> list[str]:
        """Names of weights that are not in the checkpoint of unfinished training as such."""
        return [*(latent.target.name for latent in self.stack.latents), *self._shared_names()]

    def _carriers(self) -> list[str]:
        """Names of tensors of the model that the checkpoint of unfinished training has under another name."""
        return [module.carrier for module in self._plain_model.modules() if isinstance(module, BlockMask)]

    def _shared_names(self) -> list[str]:
        """Names of the weights that are mixed from templates."""
        return [target.name for target in self._shared()]

    def _shared(self) -> list[Target]:
        """The weights that are mixed from templates."""
        return [target for entry in shared_layers(self._plain_model).values() for target in entry.targets.values()]

    @property
    def _unfinished(self) -> bool:
        """Whether what is saved now is no model: masks, parts that no plain config describes, or pieces."""
        return not self._finalized or bool(self._repack and (self._special or self._twin is not None))

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        if self._unfinished and not cast(Trainer, self).is_fsdp_enabled:
            self._restore(Path(checkpoint))
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _load_best_model(self) -> None:
        trainer = cast(Trainer, self)
        if self._unfinished and not trainer.is_fsdp_enabled:
            self._restore(Path(cast(str, trainer.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _restore(self, checkpoint: Path) -> None:
        """Load what unfinished training saved; anything missing would silently change the result.

        Raises:
            ValueError: It was saved of another model, or by other methods.
        """
        model: Any = self._plain_model
        plain = set(self._plain_names())
        state: dict[str, Tensor] = {}
        for file in weight_files(checkpoint):
            state.update(load_file(file))
        latents = {
            name.removeprefix(LATENT_PREFIX): state.pop(name) for name in list(state) if name.startswith(LATENT_PREFIX)
        }
        state = {name: tensor for name, tensor in state.items() if name not in plain}
        state.update({name: latents.pop(name) for name in self._carriers() if name in latents})
        result = model.load_state_dict(state, strict=False)
        missing = set(result.missing_keys) - plain - set(getattr(model, "all_tied_weights_keys", ()))
        missing -= set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        odd = sorted(missing or result.unexpected_keys)
        own = self.stack.tensors()
        odd += sorted(own.keys() ^ latents.keys()) or [n for n in own if own[n].shape != latents[n].shape]
        if odd:
            raise ValueError(
                f"The checkpoint does not fit this run: '{odd[0]}' is missing, unknown or of another shape. "
                "Resume with the model, methods and target modules it was made with."
            )
        self.stack.load_tensors(latents)

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        """The folder to go on from: the one asked for, or for True the last one that was written to its end.

        Raises:
            ValueError: There is none, or the one asked for was not written to its end, or a file of it is missing,
                damaged or of another step.
        """
        if not asked:
            return None
        run = Path(cast(str, cast(Trainer, self).args.output_dir))
        for folder in [run, *([Path(asked).parent] if isinstance(asked, str) else [])]:
            recover(folder)
        complete = complete_checkpoints(run)
        last = str(complete[-1]) if complete else None
        if isinstance(asked, str):
            if os.path.isdir(asked) and not is_complete(Path(asked)):
                inside = complete_checkpoints(Path(asked))
                if inside:
                    raise ValueError(
                        f"Cannot resume: '{asked}' holds checkpoints and is none itself; pass "
                        f"resume_from_checkpoint='{inside[-1]}', the last one that was written to its end."
                    )
                raise ValueError(
                    f"Cannot resume: '{asked}' was not written to its end; "
                    + (f"resume from '{last}'." if last else "train from the start.")
                )
        elif last is None:
            raise ValueError(f"Cannot resume: '{run}' has no checkpoint that was written to its end.")
        checkpoint = asked if isinstance(asked, str) else cast(str, last)
        if os.path.isdir(checkpoint):
            check_files(cast(Trainer, self), Path(checkpoint))
            self._check_methods(checkpoint)
        return checkpoint

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing after the last step: `Trainer` takes one more if that was in the middle of an epoch."""
        trainer = cast(Trainer, self)
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        trainer = cast(Trainer, self)
        self.refuse_diverged()
        folder = Path(cast(str, trainer.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        if trainer.args.should_save:
            # The last file of a checkpoint says that the others are there, which those of an earlier run do not.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self._checkpointing = True
        try:
            with torch_writes(folder):
                super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._checkpointing = False

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        trainer = cast(Trainer, self)
        # The first process writes the last files after this: no process may be behind.
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            folder = Path(output_dir)
            state = {
                "step": trainer.state.global_step,
                "files": fingerprints(folder, written_files(trainer, folder)),
                "methods": [{**identity(method), "state": method.state_dict()} for method in self.methods],
                "history": self._recorder.history,
            }
            write_text(folder / STATE_FILE, json.dumps(state))

    def _check_methods(self, checkpoint: str) -> None:
        """Refuse a checkpoint of other methods or target modules."""
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            if self._finalized:
                return
            raise ValueError(f"Cannot resume: '{path}' is missing, so the methods' schedules are unknown.")
        here, there = [identity(method) for method in self.methods], read_state(Path(checkpoint))["methods"]
        if len(here) != len(there) or any(a["name"] != b["name"] for a, b in zip(here, there, strict=True)):
            names = [" and ".join(entry["name"] for entry in side) or "no methods" for side in (there, here)]
            raise ValueError(f"Cannot resume: the checkpoint was made with {names[0]}, this run has {names[1]}.")
        for mine, saved in zip(here, there, strict=True):
            if mine["modules"] != saved["modules"]:
                raise ValueError(f"Cannot resume: {mine['name']} had other target modules in the checkpoint.")
            for option, value in saved["config"].items():
                if mine["config"].get(option) != value:
                    raise ValueError(
                        f"Cannot resume: {mine['name']} had {option}={value!r} in the checkpoint, this run has "
                        f"{mine['config'].get(option)!r}."
                    )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and not self._finalized:
            saved = read_state(Path(checkpoint))
            for method, entry in zip(self.methods, saved["methods"], strict=True):
                method.load_state_dict(entry["state"])
            self._recorder.history = saved["history"]


def identity(method: Method) -> dict[str, Any]:
    """What a method must have in common with the checkpoint it resumes from."""
    data = {"name": method.name, "modules": method.target_names, "config": asdict(method.config)}
    return as_json(data)


def as_json(data: dict[str, Any]) -> dict[str, Any]:
    """As it looks once read from JSON."""
    return cast(dict[str, Any], json.loads(json.dumps(data)))
