"""The two networks of a GAN for small images, after the residual ones of Miyato et al. (2018)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, leaky_relu
from torch.nn.utils.parametrizations import spectral_norm
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

SMALLEST = 4
"""Side of the images the generator starts from, and the discriminator ends with."""

LEAK = 0.2
"""Slope of the discriminator's leaky ReLUs below zero."""


def doublings(image_size: int) -> int:
    """How often a side of 4 pixels is doubled to get to the image's.

    Raises:
        ValueError: No number of times.
    """
    sizes = {SMALLEST * 2**n: n for n in range(1, 7)}
    if image_size not in sizes:
        raise ValueError(f"image_size must be one of {', '.join(map(str, sizes))}, got {image_size!r}.")
    return sizes[image_size]


class GeneratorConfig(PreTrainedConfig):
    """Sizes of a [`Generator`].

    Attributes:
        latent_size: Numbers an image is made of.
        width: Channels of every block.
        image_size: Side of the images: 8, 16, 32, ...
        num_channels: Of the images: 1 or 3.
    """

    model_type = "approx_image_generator"

    latent_size: int = 64
    width: int = 64
    image_size: int = 32
    num_channels: int = 3


class UpBlock(nn.Module):
    """Doubles the side: two convolutions beside a shortcut, each after a norm and a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        # Norms would take biases away again. Parameters without gradients would be all that AvaGrad's norm sees.
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) -> (N, width, 2 H, 2 W)."""
        y = self.conv1(interpolate(torch.relu(self.norm1(x)), scale_factor=2))
        y = self.conv2(torch.relu(self.norm2(y)))
        # A 1 x 1 convolution of the small image is that of the large one, at a quarter of the cost.
        return y + interpolate(self.shortcut(x), scale_factor=2)


class Generator(PreTrainedModel):
    """Makes images of normally distributed latents; saves and loads as any model of transformers.

    Args:
        config: Its sizes.

    Raises:
        ValueError: The image size is not possible.
    """

    config_class = GeneratorConfig
    main_input_name = "latents"

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__(config)
        width = config.width
        self.stem = nn.Linear(config.latent_size, width * SMALLEST**2)
        self.blocks = nn.ModuleList(UpBlock(width) for _ in range(doublings(config.image_size)))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, config.num_channels, 3, padding=1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (N, latent_size) -> images (N, num_channels, image_size, image_size), from -1 to 1."""
        x = self.stem(latents).view(len(latents), -1, SMALLEST, SMALLEST)
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.head(torch.relu(self.norm(x))))


class DownBlock(nn.Module):
    """Two convolutions beside a shortcut, each after a leaky ReLU, so that no channel dies; may halve the side."""

    def __init__(self, inputs: int, width: int, halve: bool, first: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, width, 1) if inputs != width or halve else nn.Identity()
        self.halve, self.first = halve, first

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, width, H, W), or half of that side."""
        y = self.conv1(x if self.first else leaky_relu(x, LEAK))
        y = self.conv2(leaky_relu(y, LEAK))
        if not self.halve:
            return y + self.shortcut(x)
        return avg_pool2d(y, 2) + self.shortcut(avg_pool2d(x, 2))


class Discriminator(nn.Module):
    """Tells images from generated ones.

    Call `normalize` once before training, after methods were attached: the spectral norm is that of what they make of
    a weight.

    Args:
        width: Channels of every block.
        image_size: Side of the images.
        channels: Of the images.
    """

    def __init__(self, width: int, image_size: int, channels: int) -> None:
        super().__init__()
        halved = doublings(image_size)
        inputs = [channels] + [width] * (halved + 1)
        self.blocks = nn.ModuleList(DownBlock(n, width, halve=i < halved, first=i == 0) for i, n in enumerate(inputs))
        self.head = nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight)

    def normalize(self) -> None:
        """Divide every weight by its largest singular value, from now on."""
        for module in list(self.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                spectral_norm(module)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, image_size, image_size) -> scores (N,), high for those it takes for real."""
        for block in self.blocks:
            images = block(images)
        return self.head(leaky_relu(images, LEAK).sum((2, 3)))[:, 0]


AutoConfig.register(GeneratorConfig.model_type, GeneratorConfig, exist_ok=True)
AutoModel.register(GeneratorConfig, Generator, exist_ok=True)
