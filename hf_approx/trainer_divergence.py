"""Stopping a training whose weights are no numbers any more, before anything of it is saved."""

from pathlib import Path
from typing import Any, cast

from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_approx.finite import NotFiniteError, Suspect, first_not_finite
from hf_approx.logs import get_logger
from hf_approx.methods import MethodStack
from hf_approx.trainer_files import complete_checkpoints
from hf_approx.trainer_sharded import ShardedMixin

logger = get_logger(__name__)


class _Watch(TrainerCallback):
    """Tells a trainer which steps were made, and when to look."""

    def __init__(self, trainer: "DivergenceMixin") -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._suspect.clear()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        skipped = cast(Trainer, self.trainer).accelerator.optimizer_step_was_skipped
        self.trainer._suspect.end_step(state.global_step + 1, skipped)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._look()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.refuse_diverged()


class DivergenceMixin(ShardedMixin):
    """The part of `ApproxTrainerMixin` that knows of NaN.

    A loss or a gradient that is not finite is noted on the device; weights are looked at when `Trainer` waits for the
    device anyway (logs) and such a step was noted, before every checkpoint, and when training ends.
    """

    _suspect: Suspect
    _finalized: bool
    stack: MethodStack

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of `Trainer`; notes a loss that is not finite, which its log leaves out."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if cast(Trainer, self).args.world_size == 1:  # others must see the same: their gradient is that of all
            self._suspect.see(loss)
        return cast(Tensor, loss)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        self._suspect.see(norm)
        return norm

    def _look(self) -> None:
        """Stop if a step was noted and left weights that are not finite; else go on, and say that once."""
        step = self._suspect.step()
        if step is not None:
            self.refuse_diverged()
            self._suspect.clear()
            logger.warning("The loss or its gradient was not finite at step %d; all weights still are.", step)

    def refuse_diverged(self, everywhere: bool = True) -> None:
        """Raise `NotFiniteError` if a weight, a buffer, or what a method learns, is NaN or infinite.

        Args:
            everywhere: On any process, all of which must call this.
        """
        trainer = cast(Trainer, self)
        # Of a sharded model that is finished, the first process alone has what is saved.
        finished = self._twin is not None and self._finalized
        model = self._finished if finished else self._plain_model
        found = None if model is None else first_not_finite(model)
        if found is None and not self._finalized:
            found = first_not_finite(self.stack.learned())
        if everywhere and trainer.args.world_size > 1:
            found = next((text for text in gather_object([found]) if text is not None), None)
        if found is None:
            return
        step = self._suspect.step()
        since = "" if step is None else f", and the loss or its gradient first was not finite at step {step}"
        kept = complete_checkpoints(Path(cast(str, trainer.args.output_dir)))
        again = "start again with a smaller learning rate"
        hint = f"resume from '{kept[-1]}', or {again}" if kept else again
        raise NotFiniteError(
            f"{type(self).__name__}: training diverged: after step {trainer.state.global_step} {found}{since}; "
            f"nothing of it is saved: {hint}."
        )
