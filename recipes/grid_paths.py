"""Random grids with obstacles, and the cells on the shortest paths between two points: data of any amount."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TRIES = 2000
"""Draws for one grid before its distance counts as impossible."""


@dataclass(frozen=True)
class GridPaths:
    """Where examples come from.

    Attributes:
        size: Cells on a side, at least 2.
        obstacles: Smallest and largest probability that a cell is an obstacle; each grid draws its own.

    Raises:
        ValueError: A value is out of range.
    """

    size: int
    obstacles: tuple[float, float] = (0.2, 0.3)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 2:
            raise ValueError(f"size must be an integer >= 2, got {self.size!r}.")
        if len(self.obstacles) != 2 or not 0 <= self.obstacles[0] <= self.obstacles[1] < 1:
            raise ValueError(f"obstacles must be two rising probabilities below 1, got {self.obstacles!r}.")

    def check(self, distances: Sequence[int]) -> None:
        """Raise `ValueError` for a band of distances that grids of this size do not have."""
        far = 2 * (self.size - 1)
        if len(distances) != 2 or not 1 <= distances[0] <= distances[1] <= far:
            raise ValueError(f"distances must be two rising numbers from 1 to {far}, got {list(distances)}.")

    def draw(self, count: int, distances: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Examples whose points are connected.

        Args:
            count: How many.
            distances: Shortest and longest distance of the two points, in steps; all are equally frequent.
            generator: Decides everything; on the CPU.

        Returns:
            Inputs of shape (count, 2, size, size), 1.0 at obstacles (channel 0) and at the two points (channel 1);
            targets of shape (count, 1, size, size), 1.0 at all cells of all shortest paths, both points included.

        Raises:
            ValueError: The grids have no such distances.
        """
        self.check(distances)
        wanted = torch.randint(distances[0], distances[1] + 1, (count,), generator=generator)
        inputs = torch.zeros(count, 2, self.size, self.size)
        targets = torch.zeros(count, 1, self.size, self.size)
        left = torch.arange(count)
        for _ in range(TRIES):
            free, start, end, found = self._try(wanted[left], generator)
            mask = on_shortest_path(free[found], start[found], end[found], distances[1])
            inputs[left[found], 0] = (~free[found]).float()
            inputs[left[found], 1] = (start | end)[found].float()
            targets[left[found], 0] = mask.float()
            left = left[~found]
            if not len(left):
                return inputs, targets
        raise ValueError(f"Grids of {self.size} x {self.size} have too few paths of {int(wanted[left[0]])} steps.")

    def _try(self, wanted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One draw for each wanted distance: free cells, both points, and whether the distance was found."""
        count, shape = len(wanted), (len(wanted), self.size, self.size)
        low, high = self.obstacles
        rate = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
        free = torch.rand(shape, generator=generator) >= rate
        start = _one_of(free, generator)
        distance = distances_from(free, start, int(wanted.max()))
        end = _one_of(distance == wanted[:, None, None], generator)
        return free, start, end, end.flatten(1).any(1)


def distances_from(free: Tensor, start: Tensor, limit: int) -> Tensor:
    """Steps from the start to every cell, over free cells that share a side: breadth first, all grids at once.

    Args:
        free: Where one can go: booleans of shape (N, H, W).
        start: One free cell a grid, in the same form.
        limit: Distances beyond this are not looked for.

    Returns:
        Integers of shape (N, H, W), -1 where there is no way within the limit.
    """
    distance = torch.where(start & free, 0, -1)
    frontier = start & free
    for step in range(1, limit + 1):
        near = torch.zeros_like(frontier)
        near[:, 1:] |= frontier[:, :-1]
        near[:, :-1] |= frontier[:, 1:]
        near[:, :, 1:] |= frontier[:, :, :-1]
        near[:, :, :-1] |= frontier[:, :, 1:]
        frontier = near & free & (distance < 0)
        distance[frontier] = step
    return distance


def on_shortest_path(free: Tensor, start: Tensor, end: Tensor, limit: int) -> Tensor:
    """The cells on any shortest path: those whose distances to both points add up to that of the points.

    Args:
        free: Booleans of shape (N, H, W).
        start: One free cell a grid, in the same form.
        end: Another, connected to it.
        limit: No path is longer.

    Returns:
        Booleans of shape (N, H, W).
    """
    there, back = distances_from(free, start, limit), distances_from(free, end, limit)
    length = (there * end).sum((1, 2), keepdim=True)
    return (there >= 0) & (back >= 0) & (there + back == length)


def _one_of(cells: Tensor, generator: torch.Generator) -> Tensor:
    """A random cell of each grid among those marked, in the same form; none where none is marked."""
    order = torch.rand(cells.shape, generator=generator) * cells
    best = order.flatten(1).argmax(1)
    chosen = torch.zeros_like(cells).flatten(1)
    chosen[torch.arange(len(cells)), best] = True
    return chosen.view_as(cells) & cells
