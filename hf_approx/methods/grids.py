"""What the methods that put weights on grids have in common."""

from typing import cast

from hf_approx.methods.base import Method
from hf_approx.methods.rounding import GridWeight, baked_grid


class GridMethod(Method):
    """A method whose stages are all `GridWeight`."""

    quantizes = True

    def bake(self) -> list[str]:
        """Leave weights on their grids, which are then in `grids`."""
        names = super().bake()
        for name, rounding in self.stages.items():
            target = self.targets[name]
            self.grids[target.name] = baked_grid(target.value.detach(), cast(GridWeight, rounding).grid)
        return names
