"""Optimizers: AvaGrad, and a composite that gives method parameters an optimizer of their own."""

from hf_approx.optim.avagrad import AvaGrad
from hf_approx.optim.composite import CompositeOptimizer
from hf_approx.optim.config import AvaGradConfig

__all__ = ["AvaGrad", "AvaGradConfig", "CompositeOptimizer"]
