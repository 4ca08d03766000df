"""Modules whose weights stay packed in memory, and the one that quantizes what a layer is given."""

from hf_approx.modules.activation import ActivationQuantizer, install
from hf_approx.modules.sparse_linear import MAX_DENSITY, ParameterCount, SparseLinear

__all__ = ["MAX_DENSITY", "ActivationQuantizer", "ParameterCount", "SparseLinear", "install"]
