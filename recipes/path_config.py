"""What a comparison of networks on shortest paths can be told, and the networks it compares."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from config_files import ConfigError, build
from grid_paths import GridPaths
from hf_approx import AvaGrad, AvaGradConfig, SharingConfig
from hf_approx.methods import MethodStack, attach
from path_network import GROUPS, PathNetwork

SMOKE = [
    "size=6",
    "width=4",
    "layers=4",
    "curriculum=[{distances: [1, 2], steps: 2}, {distances: [1, 3], steps: 2}]",
    "longer=[4, 5]",
    "batch_size=4",
    "held_out=8",
    "evaluate_every=2",
    "seeds=[0, 1]",
]
"""What `--smoke` overrides: seconds instead of minutes."""


@dataclass
class Stage:
    """A stage of the curriculum.

    Attributes:
        distances: Shortest and longest distance of the two points.
        steps: How long to train on these.
    """

    distances: list[int]
    steps: int

    def __post_init__(self) -> None:
        _positive(self, "steps")


@dataclass
class Competitor:
    """A network of the comparison.

    Attributes:
        lr: Learning rate of Adam for the weights.
        avagrad: Arguments of `AvaGradConfig`, to train the weights by AvaGrad instead.
        sharing: Arguments of `SharingConfig`; None: every layer has a weight of its own.
        width: Channels of every layer; None: as all others.
    """

    lr: float | None = None
    avagrad: dict[str, Any] | None = None
    sharing: dict[str, Any] | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.avagrad is None):
            raise ValueError("give lr or avagrad, and not both.")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be a number above 0, got {self.lr!r}.")
        self.optimizer([nn.Parameter(torch.zeros(1))])
        self.methods()

    def optimizer(self, params: list[nn.Parameter]) -> Optimizer:
        """Of the weights."""
        if self.avagrad is None:
            return Adam(params, lr=self.lr or 0.0)
        return AvaGrad(params, **build(AvaGradConfig, self.avagrad, "avagrad").kwargs())

    def methods(self) -> list[SharingConfig]:
        """Soft sharing, all layers in one bank, from scratch; nothing for independent layers."""
        if self.sharing is None:
            return []
        config = build(SharingConfig, self.sharing, "sharing")
        if config.groups is not None or config.target_modules is not None:
            raise ValueError("sharing: all layers have one bank; leave out groups and target_modules.")
        return [replace(config, groups=GROUPS, init="random")]


@dataclass
class PathRecipe:
    """One YAML file.

    Attributes:
        size: Cells on a side of the grids.
        width: Channels of every layer.
        layers: How many, an even number.
        curriculum: Arguments of each `Stage`, in order; the last one's distances are those of the first evaluation.
        longer: Distances of the second evaluation, beyond those of training.
        networks: Arguments of a `Competitor` for each name.
        batch_size: Grids in a batch, on each process.
        seeds: Each network is trained once with each.
        obstacles: Range of the probability that a cell is an obstacle.
        positive_weight: Weight in the loss of a cell on a path; others have 1.
        evaluate_every: Steps between evaluations.
        held_out: Grids of each evaluation.
        target_f1: How soon a network reaches it is reported.
        fold_threshold: Layers at least as similar as this are folded at the end; see `hf_approx.fold`.
    """

    size: int
    width: int
    layers: int
    curriculum: list[dict[str, Any]]
    longer: list[int]
    networks: dict[str, dict[str, Any]]
    batch_size: int = 32
    seeds: list[int] = field(default_factory=lambda: [0])
    obstacles: list[float] = field(default_factory=lambda: [0.2, 0.3])
    positive_weight: float = 4.0
    evaluate_every: int = 50
    held_out: int = 256
    target_f1: float = 0.9
    fold_threshold: float = 0.95

    def __post_init__(self) -> None:
        _positive(self, "batch_size", "evaluate_every", "held_out")
        for name in ("positive_weight", "target_f1", "fold_threshold"):
            value = getattr(self, name)
            if value <= 0 or (name != "positive_weight" and value > 1):
                raise ValueError(f"{name} is out of range: {value!r}.")
        if not self.seeds or not all(0 <= seed < 2**20 for seed in self.seeds):
            raise ValueError(f"seeds must be whole numbers from 0 to {2**20 - 1}, got {self.seeds!r}.")
        for distances in (*(stage.distances for stage in self.stages), self.longer):
            self.grids.check(distances)
        for name in self.competitors:
            self.network(name)

    @property
    def grids(self) -> GridPaths:
        """Where examples come from."""
        return GridPaths(self.size, tuple(self.obstacles))

    @property
    def stages(self) -> list[Stage]:
        """The curriculum."""
        if not self.curriculum:
            raise ConfigError("curriculum must be a list of stages, at least one.")
        return [build(Stage, options, f"curriculum {i}") for i, options in enumerate(self.curriculum)]

    @property
    def competitors(self) -> dict[str, Competitor]:
        """By name."""
        if not self.networks:
            raise ConfigError("networks must map names to options, at least one.")
        return {name: build(Competitor, options, f"networks.{name}") for name, options in self.networks.items()}

    def network(self, name: str) -> MethodStack:
        """The methods at work on a fresh network."""
        competitor = self.competitors[name]
        width = self.width if competitor.width is None else competitor.width
        return attach(PathNetwork(width, self.layers), competitor.methods())


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {value!r}.")
