"""The compression methods, one file each, long configs beside theirs.

A new method is a file and a line in `METHODS`.
"""

from hf_approx.methods.base import Method, MethodConfig
from hf_approx.methods.dropping import LayerDropping, LayerDroppingConfig
from hf_approx.methods.fixed_precision import FixedPrecision, FixedPrecisionConfig
from hf_approx.methods.magnitude import MagnitudePruning, MagnitudePruningConfig
from hf_approx.methods.movement import MovementPruning, MovementPruningConfig
from hf_approx.methods.sharing import SharingConfig, SoftSharing
from hf_approx.methods.similarity import block_similarity, layer_similarity
from hf_approx.methods.smol import Smol
from hf_approx.methods.smol_config import SmolConfig
from hf_approx.methods.sparsification import ContinuousSparsification
from hf_approx.methods.sparsification_config import SparsificationConfig
from hf_approx.methods.stack import MethodStack, attach
from hf_approx.methods.uniform import UniformQuantization, UniformQuantizationConfig

METHODS: dict[str, type[MethodConfig]] = {
    "sparsification": SparsificationConfig,
    "magnitude": MagnitudePruningConfig,
    "movement": MovementPruningConfig,
    "layer_dropping": LayerDroppingConfig,
    "sharing": SharingConfig,
    "smol": SmolConfig,
    "fixed_precision": FixedPrecisionConfig,
    "uniform": UniformQuantizationConfig,
}
"""Config classes by the name a recipe or the command line uses."""

__all__ = [
    "METHODS",
    "ContinuousSparsification",
    "FixedPrecision",
    "FixedPrecisionConfig",
    "LayerDropping",
    "LayerDroppingConfig",
    "MagnitudePruning",
    "MagnitudePruningConfig",
    "Method",
    "MethodConfig",
    "MethodStack",
    "MovementPruning",
    "MovementPruningConfig",
    "SharingConfig",
    "Smol",
    "SmolConfig",
    "SoftSharing",
    "SparsificationConfig",
    "UniformQuantization",
    "UniformQuantizationConfig",
    "attach",
    "block_similarity",
    "layer_similarity",
]
