"""What happens around `save_pretrained`.

A packed model's folder is the old one or the new one, whole; its config says what is in the files beside it; models
that methods still work on are refused. transformers has no hook for any of it: a quantizer is asked for the tensors,
but not told the folder, and models in training, or with the config of a packed one, have no quantizer. So the
functions that save models are wrapped, once, when this module is imported; other models pass through them as before.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from hf_approx.checkpoint.claims import guard, truthful
from hf_approx.checkpoint.config import QUANT_METHOD
from hf_approx.checkpoint.quantizer import ApproxQuantizer
from hf_approx.layout import CONFIG_FILE
from hf_approx.modules.activation import ActivationQuantizer
from hf_approx.modules.bank import shared_parameters
from hf_approx.staging import staged
from hf_approx.structures import sizes_of
from hf_approx.targets import LATENTS

METHOD = "hf_approx_method"
"""Attribute of the modules that a method put into a model: its name."""

_unfinished_allowed: ContextVar[bool] = ContextVar("unfinished_allowed", default=False)


@contextmanager
def unfinished_allowed() -> Iterator[None]:
    """Let a model be saved that is not finished: by those who say in the folder that it is no model."""
    token = _unfinished_allowed.set(True)
    try:
        yield
    finally:
        _unfinished_allowed.reset(token)


def at_work(model: nn.Module) -> tuple[str, str] | None:
    """A method that is at work on a model, and the name of the first thing it works on; None if none is."""
    for name, module in model.named_modules():
        for parameter, latent in (vars(module).get(LATENTS) or {}).items():
            return latent.stages[-1].method, f"{name}.{parameter}"
        if hasattr(module, METHOD):
            return getattr(module, METHOD), name.rpartition(".")[0]
    return None


def refuse_unfinished(model: nn.Module, where: str, packs: bool = True) -> None:
    """Raise `ValueError` if what is saved of a model now could not be loaded again.

    Args:
        model: To be saved.
        where: What the message begins with.
        packs: Whether it is saved by transformers, which asks the quantizer of a packed model.
    """
    if _unfinished_allowed.get():
        return
    found = at_work(model)
    if found is not None:
        raise ValueError(
            f"{where}: {found[0]} is still at work on '{found[1]}', and nothing could load what it trains as a model; "
            "call finalize() and attach_packing first. ApproxTrainer does both at the end of training, and its own "
            "checkpoints are to resume from."
        )
    if packs and isinstance(getattr(model, "hf_quantizer", None), ApproxQuantizer):
        return
    for name, module in model.named_modules():
        does = "shares its weight" if shared_parameters(module) else ""
        does = "quantizes its input" if isinstance(module, ActivationQuantizer) else does
        if does:
            raise ValueError(
                f"{where}: '{name.removesuffix('.input_quantizer')}' {does}, which only a packed model can say: call "
                "save_pretrained of the whole model, after attach_packing."
            )
    if sizes_of(model) is not None:
        raise ValueError(
            f"{where}: layers of this {type(model).__name__} have sizes that only a packed model can say: call "
            "attach_packing first."
        )


def _whole(original: Callable[..., None]) -> Callable[..., None]:
    """`PreTrainedModel.save_pretrained` that replaces a packed model's folder as a whole."""
    known = inspect.signature(original).parameters

    @functools.wraps(original)
    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        refuse_unfinished(self, "save_pretrained")
        packed = isinstance(getattr(self, "hf_quantizer", None), ApproxQuantizer)
        if packed and kwargs.get("distributed_checkpoint"):
            raise ValueError("save_pretrained: packed weights cannot be saved with distributed_checkpoint=True.")
        adapters = getattr(self, "_hf_peft_config_loaded", False)  # alone are written then
        if adapters or not (is_main_process and _is_first()) or not (packed or _holds_packed(save_directory)):
            with truthful(self):
                original(self, save_directory, is_main_process, state_dict, push_to_hub, *args, **kwargs)
            return
        options = {name: value for name, value in kwargs.items() if not push_to_hub or name in known}
        with staged(save_directory) as folder, truthful(self) as said:
            original(self, str(folder), is_main_process, state_dict, False, *args, **options)
            if said is not None and not said.training:
                guard(folder)
        if push_to_hub:
            # Only what was written is pushed; and what is saved stays so if the Hub says no.
            hub = {
                name: value
                for name, value in kwargs.items()
                if name not in known or name in ("token", "max_shard_size")
            }
            self.push_to_hub(hub.pop("repo_id", Path(os.path.abspath(save_directory)).name), **hub)

    return save_pretrained


def _refusing(original: Callable[..., Any], where: str, position: int, packs: bool = True) -> Callable[..., Any]:
    """A function that saves a model, its argument of this position, without writing unfinished ones."""

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        model = args[position] if len(args) > position else kwargs.get("model")
        if isinstance(model, nn.Module):
            refuse_unfinished(model, where, packs)
        return original(*args, **kwargs)

    return save


def _is_first() -> bool:
    """Whether this process is alone or the first of several, of which transformers lets no other write."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


def _holds_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder has the config of a packed model."""
    config = Path(folder) / CONFIG_FILE
    return config.is_file() and f'"{QUANT_METHOD}"'.encode() in config.read_bytes()


PreTrainedModel.save_pretrained = _whole(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
PreTrainedModel.push_to_hub = _refusing(PreTrainedModel.push_to_hub, "push_to_hub", 0)  # type: ignore[method-assign,assignment]
Accelerator.save_model = _refusing(Accelerator.save_model, "save_model", 1, packs=False)
