"""The transformers side of packed checkpoints: their config, the quantizer that loads and saves them."""

from hf_approx.checkpoint.attach import attach_packing
from hf_approx.checkpoint.config import QUANT_METHOD, ApproxConfig
from hf_approx.checkpoint.quantizer import ApproxQuantizer, keep_own_names
from hf_approx.checkpoint.saving import at_work, unfinished_allowed
from hf_approx.checkpoint.zeros import keep_zeros

__all__ = [
    "QUANT_METHOD",
    "ApproxConfig",
    "ApproxQuantizer",
    "at_work",
    "attach_packing",
    "keep_own_names",
    "keep_zeros",
    "unfinished_allowed",
]
