"""Model compression and tuning for Hugging Face models. Importing this registers the packed format."""

from hf_approx.checkpoint import ApproxConfig, attach_packing, keep_zeros
from hf_approx.folding import fold
from hf_approx.loops import TicketConfig
from hf_approx.methods import (
    FixedPrecisionConfig,
    LayerDroppingConfig,
    MagnitudePruningConfig,
    MovementPruningConfig,
    SharingConfig,
    SmolConfig,
    SparsificationConfig,
    UniformQuantizationConfig,
    block_similarity,
    layer_similarity,
)
from hf_approx.optim import AvaGrad, AvaGradConfig
from hf_approx.packing import PackedFormatError
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
    "MovementPruningConfig",
    "PackedFormatError",
    "SharingConfig",
    "SmolConfig",
    "SparsificationConfig",
    "TicketConfig",
    "TicketTrainer",
    "UniformQuantizationConfig",
    "attach_packing",
    "block_similarity",
    "fold",
    "keep_zeros",
    "layer_similarity",
]
