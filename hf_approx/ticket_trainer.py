"""Ticket search by a `Trainer`: its optimizers, schedules, collators, logs, callbacks and evaluation."""

import copy
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy, TrainOutput, has_length

from hf_approx.files import replacing, torch_writes
from hf_approx.loops import Rounds, Ticket, TicketConfig
from hf_approx.loops.states import begin_state, end_state
from hf_approx.optim import CompositeOptimizer
from hf_approx.staging import recover
from hf_approx.trainer import ApproxTrainer, _Schedule
from hf_approx.trainer_files import check_whole

STATE_FILE = "search.pt"


class TicketTrainer(ApproxTrainer):
    """Searches for a winning ticket: `train` runs every round, rewinds, and trains the ticket.

    Each of these trainings is an ordinary one of `Trainer`, with a fresh optimizer and schedule, as long as
    `TrainingArguments` says and evaluated at its end. The schedule moves the learning rate of the scores too, as
    published; weight decay never touches them. When `train` ends the model is an ordinary one with real zeros, and
    `save_model` writes it packed.

    The metric is `args.metric_for_best_model`, by default the evaluation loss. Where smaller is better
    (`args.greater_is_better`), a `Ticket` has its negative, so that larger is better everywhere.

    Unless `args.save_strategy` is "no", the state is saved in `args.output_dir` after each round, in place of
    `Trainer`'s checkpoints; `train(resume_from_checkpoint=True)` goes on after the last one. Logs say in `round` which
    training they are of, from 1; steps are counted from 0 in each.

    Args:
        search: How to search; `epochs` stays None.
        *args: Those of `ApproxTrainer`.
        **kwargs: Those of `ApproxTrainer`, without `approx`: the method is that of the search.

    Attributes:
        ticket: What was found, once `train` has ended.

    Raises:
        ValueError: The config does not fit the model, or asks for what a search cannot do. The model is then
            unchanged.
    """

    def __init__(self, *args: Any, search: TicketConfig | None = None, **kwargs: Any) -> None:
        config = TicketConfig() if search is None else search
        if "approx" in kwargs:
            raise ValueError("TicketTrainer: the method is TicketConfig.method; leave out approx.")
        if config.epochs is not None:
            raise ValueError(
                "TicketTrainer: TrainingArguments says how long a round is; leave out TicketConfig.epochs."
            )
        super().__init__(*args, approx=config.method, **kwargs)
        self.ticket: Ticket | None = None
        self.rounds = _TrainerRounds(self, config)
        self.pop_callback(_Schedule)
        self.add_callback(_RoundSchedule(self.rounds))
        self._saves = self.args.save_strategy != SaveStrategy.NO
        # Within a round nothing is saved: the next round would overwrite it.
        self.args = copy.copy(self.args)
        self.args.save_strategy = SaveStrategy.NO

    def _refuse_unsupported(self) -> None:
        super()._refuse_unsupported()
        if self.is_fsdp_enabled:
            raise ValueError("TicketTrainer: rounds rewind whole weights; search without FSDP.")
        if self.eval_dataset is None:
            raise ValueError("TicketTrainer: a ticket needs a metric; give an eval_dataset.")
        if self.args.load_best_model_at_end:
            raise ValueError("TicketTrainer: the ticket is what a training ends with; no load_best_model_at_end.")
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            raise ValueError("TicketTrainer: evaluation between rounds must not round the weights; no ..._full_eval.")
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                "TicketTrainer: every round starts with a fresh optimizer; give optimizer_cls_and_kwargs or "
                "TrainingArguments, not optimizers."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A fresh one for the weights, beside that of the scores, which keeps its momentum through the search."""
        optimizer, scores = super().create_optimizer(model), self.rounds.mask_optimizer
        if scores is not None:
            assert isinstance(optimizer, CompositeOptimizer)
            for group, fresh in zip(scores.param_groups, self.methods[0].param_groups(), strict=True):
                group["lr"] = fresh["lr"]
            self.optimizer = optimizer = CompositeOptimizer(optimizer.optimizers[0], scores)
        return optimizer

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Search, rewind, train the ticket, finalize.

        Args:
            resume_from_checkpoint: True to go on after the last round saved in `args.output_dir`, or another
                search's `output_dir`.
            trial: Not supported.
            ignore_keys_for_eval: Keys of the model's output to leave out of predictions.

        Returns:
            That of the last training, the ticket's.

        Raises:
            ValueError: There is nothing to go on from, the state is of another search, or the search is over.
        """
        if self._finalized or trial is not None:
            raise ValueError("TicketTrainer: a trainer searches once, without trials; make a new one.")
        if resume_from_checkpoint:
            given = isinstance(resume_from_checkpoint, str)
            self.rounds.load(Path(cast(str, resume_from_checkpoint if given else self.args.output_dir)))
        self.rounds.ignore_keys = ignore_keys_for_eval
        self.ticket = self.rounds.run()
        self.approx_report["ticket"] = asdict(self.ticket)
        return self.rounds.output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the number of the training, to the log alone: `evaluate` returns the same numbers as metrics."""
        super().log(logs if self.ticket else {**logs, "round": self.rounds.round + 1}, *args, **kwargs)


class _RoundSchedule(TrainerCallback):
    """Tells the search of every training's length and steps."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: DataLoader[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        batches = len(cast(DataLoader[Any], train_dataloader)) if has_length(train_dataloader) else None
        epoch = state.max_steps if batches is None else math.ceil(batches / args.gradient_accumulation_steps)
        self.rounds.start_training(epoch, state.max_steps)
        self.rounds.stack.begin()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rounds.before_step(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.rounds.stack.after_step()


class _TrainerRounds(Rounds):
    """The rounds of a search whose every training is one of `Trainer.train`."""

    output: TrainOutput
    steps = 0

    def __init__(self, trainer: TicketTrainer, config: TicketConfig) -> None:
        super().__init__(trainer.stack, config)
        self.trainer = trainer
        self.ignore_keys: list[str] | None = None

    def _train(self, name: str) -> float:
        trainer = self.trainer
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.forget_evaluation()
        logged = trainer.state.log_history
        # A search that goes on after a crash draws the same numbers as one that never stopped.
        set_seed(trainer.args.seed + self.round)
        self.output = Trainer.train(trainer, ignore_keys_for_eval=self.ignore_keys)
        trainer.state.log_history[:0] = logged
        self.steps += trainer.state.global_step
        return self.output.training_loss

    def _evaluate(self) -> float:
        args = self.trainer.args
        values = self.trainer.evaluate(ignore_keys=self.ignore_keys)
        name = args.metric_for_best_model or "loss"
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key not in values:
            raise ValueError(f"TicketTrainer: metric_for_best_model {name!r} is not among {', '.join(values)}.")
        return values[key] if args.greater_is_better else -values[key]

    def _finalize(self) -> list[str]:
        names = [target.name for target in self.method.targets.values()]
        self.trainer.about.setdefault("steps", self.steps)
        report = self.trainer.finalize()
        self.trainer.log({f"approx/{name}": value for name, value in report["totals"].items()})
        return names

    def _save(self) -> None:
        trainer, folder = self.trainer, Path(cast(str, self.trainer.args.output_dir)) / f"round-{self.round}"
        if not trainer._saves:
            return
        if trainer.args.should_save:
            begin_state(folder)
            state = {**self.state_dict(), "steps": self.steps, "model": self.plain.state_dict()}
            state["recorded"] = trainer._recorder.history
            with torch_writes(folder), replacing(folder / STATE_FILE) as file:
                torch.save(state, file)
            end_state(folder, self._identity())
        trainer.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> None:
        """Go on from the newest state in a folder."""
        recover(folder)
        saved = self.saved(folder)
        if saved is None:
            raise ValueError(f"TicketTrainer: {folder} holds no finished round to go on from.")
        check_whole(saved / STATE_FILE)
        state = torch.load(saved / STATE_FILE, map_location="cpu", weights_only=True)
        self.plain.load_state_dict(state.pop("model"))
        self.steps = state.pop("steps", 0)
        self.trainer._recorder.history = state.pop("recorded", [])
        self.load_state_dict(state)
