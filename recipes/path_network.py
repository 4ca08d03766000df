"""A residual network of equal layers that marks the shortest paths on a grid, with or without shared weights."""

import torch
from torch import Tensor, nn

GROUPS = {"layers": r"layers\.\d+\.conv"}
"""One bank for all layers: `SharingConfig(groups=...)`."""


class Layer(nn.Module):
    """A 3 x 3 convolution and its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> the same shape."""
        return self.norm(self.conv(x))


class PathNetwork(nn.Module):
    """Layers of one width at full resolution, a shortcut around every two.

    A cell sees `layers + 1` cells far: paths that are much longer cannot be marked.

    Args:
        width: Channels of every layer.
        layers: An even number of them.

    Raises:
        ValueError: A size is not possible.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        for name, value, least in (("width", width, 1), ("layers", layers, 2)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
        if layers % 2:
            raise ValueError(f"layers must be even, got {layers}.")
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Obstacles and points (N, 2, H, W) -> logits (N, 1, H, W) of being on a shortest path."""
        x = torch.relu(self.stem(x))
        for i in range(0, len(self.layers), 2):
            x = torch.relu(x + self.layers[i + 1](torch.relu(self.layers[i](x))))
        return self.head(x)
