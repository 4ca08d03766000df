"""Modules whose weights stay packed in memory."""

from hf_approx.modules.sparse_linear import MAX_DENSITY, SparseLinear

__all__ = ["MAX_DENSITY", "SparseLinear"]
