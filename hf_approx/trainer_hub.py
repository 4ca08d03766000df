"""What a trainer leaves beside the weights, and how it pushes them: report, pictures, arguments, model card."""

import functools
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.constants import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modelcard import is_hf_dataset
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import has_length

from hf_approx.cards import write_card
from hf_approx.files import write_text
from hf_approx.hub import license_of, push_folder
from hf_approx.inspection import inspect_checkpoint
from hf_approx.layout import ARGUMENTS_FILE, CARD_FILE, PICTURES, REPORT_FILE, is_ours
from hf_approx.logs import get_logger
from hf_approx.plots import plot_layers
from hf_approx.report_plots import has_history, plot_training
from hf_approx.similarity_plots import plot_similarity

logger = get_logger(__name__)

NOT_MEASUREMENTS = ("epoch", "_runtime", "_per_second", "_time")
FILE_LOADERS = ("csv", "json", "pandas", "parquet", "text")


class HubMixin:
    """The part of `ApproxTrainerMixin` that writes cards and pushes.

    Attributes:
        about: What the model card says and the trainer cannot know, or guesses wrong: `model_name`, `repo_id`,
            `base_model`, `license`, `language`, `tags`, `task`, `datasets` (Hub ids), `dataset_name`, `dataset_type`,
            `dataset_config`, `dataset_split`, and a `note` to begin with.
    """

    approx_report: dict[str, Any]
    about: dict[str, Any]
    _finalized: bool
    _measured: dict[str, Any]
    _measured_state: dict[str, tuple[int, int]]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; what the finished model reaches on the trainer's own `eval_dataset` is kept for its card."""
        trainer = cast(Trainer, self)
        metrics = super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]
        own = eval_dataset is None or eval_dataset is trainer.eval_dataset
        if own and self._finalized and not trainer.is_in_train:
            data: Any = trainer.eval_dataset
            counted = has_length(data) and not isinstance(data, (dict, str))
            names = [name for name in metrics if not name.endswith(NOT_MEASUREMENTS)]
            self._measured = {
                "metrics": {name.removeprefix("eval_"): metrics[name] for name in names},
                "samples": len(data) if counted else None,
            }
            self._measured_state = self._state()
        return cast(dict[str, float], metrics)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write the card of the model saved in the output folder; nothing in training, when there is no such model.

        The arguments are those of `Trainer`, and `dataset_name`: what TRL calls the Hub id of the data set.
        """
        trainer = cast(Trainer, self)
        if trainer.is_in_train:
            return
        dataset_tags, dataset = dataset_tags or dataset_name, dataset or dataset_name
        told = {
            "language": language,
            "license": license,
            "tags": _listed(tags),
            "model_name": model_name,
            "base_model": finetuned_from,
            "task": _first(tasks),
            "datasets": _listed(dataset_tags),
            "dataset_type": _first(dataset_tags),
            "dataset_name": _first(dataset),
            "dataset_config": _first(dataset_args),
        }
        self.about.update({name: value for name, value in told.items() if value is not None})
        folder = Path(cast(str, trainer.args.output_dir))
        if isinstance(trainer.model, PreTrainedModel) and not (folder / CONFIG_NAME).is_file():
            raise ValueError(f"{type(self).__name__}: there is no model in {folder} yet; call save_model() first.")
        if trainer.is_world_process_zero():
            self._save_report(folder)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """Save to the output folder and push that in one commit; see `hf_approx.hub.push_folder`.

        Args:
            commit_message: Title of the commit.
            blocking: False uploads in the background and returns a future.
            token: Default `args.hub_token`, else that of `HF_TOKEN` or `hf auth login`. It is written nowhere.
            revision: Branch; default `args.hub_revision`, else `main`.
            private: Default `args.hub_private_repo`.
            kwargs: Arguments of `create_model_card`.

        Returns:
            The commit; as with `Trainer`, a future if not blocking, and None on other processes than the first.

        Raises:
            ValueError: Training has not ended.
            ConnectionError: The Hub cannot be reached or says no.
        """
        trainer, args = cast(Trainer, self), cast(Trainer, self).args
        if not self._finalized:
            raise ValueError(f"{type(self).__name__}: push_to_hub pushes the finished model; train first.")
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return cast(CommitInfo, None)
        base = self._description()["base_model"]
        if base is not None and "license" not in self.about:
            self.about["license"] = license_of(base)
        self.create_model_card(**kwargs)
        folder = Path(cast(str, args.output_dir))
        push = functools.partial(
            _push_and_tell,
            folder,
            trainer.hub_model_id or args.hub_model_id or folder.absolute().name,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            token=token or args.hub_token,
            message=commit_message or "End of training",
            is_model=isinstance(trainer.model, PreTrainedModel),
        )
        return push() if blocking else cast(CommitInfo, HfApi().run_as_future(push))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: checkpoints of unfinished training are no models, and hold pickles. The finished one is pushed."""

    def _description(self) -> dict[str, Any]:
        """What the card says of the run beside numbers: what `about` says, and guesses for the rest."""
        trainer = cast(Trainer, self)
        args, model = trainer.args, trainer.model
        base = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
        guess: dict[str, Any] = {
            "model_name": Path(args.hub_model_id or str(args.output_dir)).name,
            "repo_id": trainer.hub_model_id or args.hub_model_id,
            "base_model": base if base and not Path(base).exists() else None,
            "steps": trainer.state.global_step,
        }
        data: Any = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        if is_hf_dataset(data) and data.builder_name not in (None, *FILE_LOADERS):
            guess["dataset_name"] = guess["dataset_type"] = data.builder_name
            guess["dataset_config"] = data.config_name
            guess["dataset_split"] = None if data.split is None else str(data.split)
        described = {**guess, **self.about}
        tags = [*(described.get("tags") or ()), *(getattr(model, "model_tags", None) or ())]
        return {**described, "tags": list(dict.fromkeys(tags))} if tags else described

    def _state(self) -> dict[str, tuple[int, int]]:
        """Which parameters the model has, and how often each was written to: an edit changes it, saving does not."""
        model = cast(nn.Module, cast(Trainer, self).model)
        return {name: (id(param), param._version) for name, param in model.named_parameters()}

    def _save_report(self, folder: Path) -> None:
        """The report as JSON and, where matplotlib is installed, as pictures; and the model card made of them."""
        if self._measured and self._measured_state != self._state():
            logger.warning("The model changed after it was evaluated: its report and card are without metrics.")
            self._measured = {}
        self.approx_report["about"] = self._description()
        self.approx_report["evaluation"] = self._measured
        write_text(folder / REPORT_FILE, json.dumps(self.approx_report, indent=2) + "\n")
        plots = importlib.util.find_spec("matplotlib") is not None
        if plots and has_history(self.approx_report):
            plot_training(self.approx_report, folder / "training.png")
        if not isinstance(cast(Trainer, self).model, PreTrainedModel):
            return
        inspection = inspect_checkpoint(folder)
        if plots and any(row.packed and not row.bank for row in inspection.rows):
            plot_layers(inspection, folder / "layers.png")
        banks = {k: v for entry in self.approx_report.get("methods", ()) for k, v in entry.get("banks", {}).items()}
        if plots and banks:
            plot_similarity({k: v["similarity"]["weights"] for k, v in banks.items()}, folder / "similarity.png")
        write_card(folder)

    def _save_arguments(self, folder: Path) -> None:
        """The training arguments as JSON, without tokens, in the place of the pickle that `Trainer` writes."""
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        arguments: Mapping[str, Any] = cast(Trainer, self).args.to_dict()
        public = {name: value for name, value in arguments.items() if not name.endswith("token")}
        write_text(folder / ARGUMENTS_FILE, json.dumps(public, indent=2, default=str) + "\n")


def remove_report(folder: Path) -> None:
    """Remove what an earlier save left of another model: report, pictures, and a card that nobody has edited."""
    for name in (REPORT_FILE, *PICTURES):
        (folder / name).unlink(missing_ok=True)
    if is_ours(folder / CARD_FILE):
        (folder / CARD_FILE).unlink()


def _push_and_tell(*args: Any, **kwargs: Any) -> CommitInfo:
    pushed = push_folder(*args, **kwargs)
    print(pushed)
    return pushed.commit


def _listed(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def _first(value: str | list[str] | None) -> str | None:
    return value if value is None or isinstance(value, str) else next(iter(value), None)
