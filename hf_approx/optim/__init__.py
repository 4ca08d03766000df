"""Optimizers: AvaGrad, a composite that gives method parameters an optimizer of their own, and searches of rates."""

from hf_approx.optim.avagrad import AvaGrad
from hf_approx.optim.composite import CompositeOptimizer
from hf_approx.optim.config import AvaGradConfig
from hf_approx.optim.search import SearchResult, gradient_scale, grid_search, scaled_lr, separable_search

__all__ = [
    "AvaGrad",
    "AvaGradConfig",
    "CompositeOptimizer",
    "SearchResult",
    "gradient_scale",
    "grid_search",
    "scaled_lr",
    "separable_search",
]
