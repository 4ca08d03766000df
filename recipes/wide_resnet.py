"""The wide residual network of Zagoruyko and Komodakis (2016) for small images, and its banks of templates."""

import torch
from torch import Tensor, nn

from hf_approx import SharingConfig


class Block(nn.Module):
    """Norm, ReLU and 3 x 3 convolution, twice, beside a shortcut: 1 x 1 convolution where the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y = torch.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(y)
        y = torch.relu(self.norm2(self.conv1(y)))
        return beside + self.conv2(y)


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of 16, 32 and 64 times `width` channels.

    Args:
        depth: Number of layers, 4 more than a multiple of 6.
        width: Factor of the channels.
        channels: Of the images.
        classes: To tell apart.

    Raises:
        ValueError: The depth is not possible.
    """

    def __init__(self, depth: int = 28, width: int = 10, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth must be 4 more than a multiple of 6, got {depth}.")
        sizes = [16, 16 * width, 32 * width, 64 * width]
        self.stem = nn.Conv2d(channels, sizes[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for i in range(3):
            first = Block(sizes[i], sizes[i + 1], stride=1 if i == 0 else 2)
            others = [Block(sizes[i + 1], sizes[i + 1], stride=1) for _ in range((depth - 4) // 6 - 1)]
            self.stages.append(nn.Sequential(first, *others))
        self.norm = nn.BatchNorm2d(sizes[3])
        self.head = nn.Linear(sizes[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) -> logits (N, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def published_sharing(templates: int) -> SharingConfig:
    """SWRN-depth-width-templates: one bank a stage for the 3 x 3 convolutions of all blocks but the first.

    Templates and coefficients start at random, as published: for training from scratch.
    """
    groups = {f"stage{i}": rf"stages\.{i}\.[1-9]\d*\.conv[12]" for i in range(3)}
    return SharingConfig(templates=templates, groups=groups, init="random")
