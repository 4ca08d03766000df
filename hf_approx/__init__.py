"""Model compression and tuning for Hugging Face models. Importing this registers the packed format."""

import importlib
from typing import TYPE_CHECKING, Any

from hf_approx.checkpoint import ApproxConfig, attach_packing, keep_zeros
from hf_approx.exports import export_model
from hf_approx.folding import fold
from hf_approx.loops import TicketConfig
from hf_approx.methods import (
    FixedPrecisionConfig,
    LayerDroppingConfig,
    MagnitudePruningConfig,
    MethodStack,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    attach,
    block_similarity,
    layer_similarity,
)
from hf_approx.optim import AvaGrad, AvaGradConfig
from hf_approx.packing import PackedFormatError

if TYPE_CHECKING:
    from hf_approx.ticket_trainer import TicketTrainer
    from hf_approx.trainer import ApproxSeq2SeqTrainer, ApproxTrainer, ApproxTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "ApproxConfig",
    "ApproxSeq2SeqTrainer",
    "ApproxTrainer",
    "ApproxTrainerMixin",
    "AvaGrad",
    "AvaGradConfig",
    "FixedPrecisionConfig",
    "LayerDroppingConfig",
    "MagnitudePruningConfig",
    "MethodStack",
    "MovementPruningConfig",
    "PackedFormatError",
    "SharingConfig",
    "SmolConfig",
    "SparsificationConfig",
    "TicketConfig",
    "TicketTrainer",
    "UniformQuantizationConfig",
    "attach",
    "attach_packing",
    "block_similarity",
    "export_model",
    "fold",
    "keep_zeros",
    "layer_similarity",
]

# transformers' Trainer imports datasets, pandas and more, which who only loads a model need not wait for.
_TRAINERS = {
    "ApproxSeq2SeqTrainer": "hf_approx.trainer",
    "ApproxTrainer": "hf_approx.trainer",
    "ApproxTrainerMixin": "hf_approx.trainer",
    "TicketTrainer": "hf_approx.ticket_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _TRAINERS:
        raise AttributeError(f"module 'hf_approx' has no attribute '{name}'")
    globals()[name] = getattr(importlib.import_module(_TRAINERS[name]), name)
    return globals()[name]
