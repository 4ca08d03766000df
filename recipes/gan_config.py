"""What a comparison of image generators can be told."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from common import RunConfig
from config_files import ConfigError, build
from gan_networks import Discriminator, Generator, GeneratorConfig
from hf_approx import AvaGrad, AvaGradConfig
from hf_approx.methods import MethodConfig, MethodStack, attach
from hf_approx.packing import dtype_from_name

SMOKE = [
    "width=4",
    "discriminator_width=4",
    "batch_size=8",
    "steps=8",
    "samples=64",
    "evaluate_every=4",
    "max_train_samples=256",
    "max_eval_samples=64",
    "feature_epochs=1",
]
"""What `--smoke` overrides: seconds instead of minutes."""


@dataclass
class AdamConfig:
    """Adam's settings, to compare with.

    Attributes:
        lr: Learning rate.
        betas: Decay of the running mean of the gradient and of its square.
        eps: Added to the root of the second moment.
    """

    lr: float = 2e-4
    betas: Sequence[float] = (0.5, 0.999)
    eps: float = 1e-8

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments of `torch.optim.Adam`."""
        return {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps}


@dataclass
class GanRecipe:
    """One YAML file.

    Attributes:
        dataset: Arguments of `datasets.load_dataset`, or `{python: MODULE:FUNCTION, ...}`; see `RunConfig`.
        image_size: Side of the images, which are resized to it: 8, 16, 32, ...
        steps: Steps of the generator.
        num_channels: 1 for grey images, 3 for coloured ones.
        image_column: Column of the images.
        label_column: Column of class numbers or names; only the features of the distance learn from them.
        train_split: Split to train on.
        eval_split: Images the distance is measured to.
        max_train_samples: Use the first so many only.
        max_eval_samples: Use the first so many only.
        latent_size: Numbers an image is made of.
        width: Channels of the generator.
        discriminator_width: Channels of the discriminator.
        batch_size: Real, and as many generated, images in a batch, on each process.
        n_critic: Steps of the discriminator for each of the generator.
        generator_optimizer: Arguments of `AvaGradConfig` for the generator's weights; with `method: adam`, of `Adam`.
        discriminator_optimizer: The same for the discriminator.
        approx: Methods on the generator, in order: each `{method: NAME, ...fields of its config}`.
        discriminator_approx: The same on the discriminator, which is not saved; by default it stays dense.
        store_dtype: Dtype of the compressed generator's other weights when stored.
        baseline: Also train the dense generator, with the same settings.
        seed: Of both networks, latents and batches.
        samples: Images that are generated for each distance.
        evaluate_every: Steps between distances.
        save_every: Steps between checkpoints, which `--resume` goes on from. Default: none.
        feature_size: Number of features the distance compares; many need many images.
        feature_epochs: Epochs of the classifier that makes them.
        card: What the model card says and no run can know; see `ApproxTrainer.about`.
    """

    dataset: dict[str, Any]
    image_size: int
    steps: int
    num_channels: int = 3
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    eval_split: str = "validation"
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    latent_size: int = 64
    width: int = 64
    discriminator_width: int = 64
    batch_size: int = 64
    n_critic: int = 1
    generator_optimizer: dict[str, Any] = field(default_factory=dict)
    discriminator_optimizer: dict[str, Any] = field(default_factory=dict)
    approx: list[dict[str, Any]] = field(default_factory=list)
    discriminator_approx: list[dict[str, Any]] = field(default_factory=list)
    store_dtype: str | None = "float16"
    baseline: bool = True
    seed: int = 0
    samples: int = 1000
    evaluate_every: int = 500
    save_every: int | None = None
    feature_size: int = 32
    feature_epochs: int = 10
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.num_channels not in (1, 3):
            raise ConfigError(f"num_channels must be 1 or 3, got {self.num_channels!r}.")
        if self.samples <= self.feature_size:
            raise ConfigError(
                f"samples must be more than feature_size: {self.samples} images do not tell how {self.feature_size} "
                "features vary."
            )
        if self.store_dtype is not None:
            dtype_from_name(self.store_dtype)
        self.data.methods()  # checks what every recipe has
        for network in ("generator", "discriminator"):
            self.optimizer(network, [nn.Parameter(torch.zeros(1))])
        # On networks that are thrown away, so that a mistake is reported before anything is trained.
        self.generator(compressed=bool(self.approx))
        self.discriminator(compressed=bool(self.approx))

    @property
    def data(self) -> RunConfig:
        """The part of the config that every recipe has."""
        names = (
            *("dataset", "train_split", "eval_split", "max_train_samples", "max_eval_samples"),
            *("approx", "baseline", "card"),
        )
        return RunConfig(**{name: getattr(self, name) for name in names})

    def optimizer_config(self, network: str) -> AvaGradConfig | AdamConfig:
        """Settings for the weights of the `"generator"` or the `"discriminator"`."""
        where = f"{network}_optimizer"
        options = dict(getattr(self, where))
        kinds: dict[str, type[AvaGradConfig] | type[AdamConfig]] = {"avagrad": AvaGradConfig, "adam": AdamConfig}
        kind = options.pop("method", "avagrad")
        if kind not in kinds:
            raise ConfigError(f"{where}: method must be avagrad or adam, got {kind!r}.")
        return build(kinds[kind], options, where)

    def optimizer(self, network: str, params: list[nn.Parameter]) -> Optimizer:
        """Of the weights of one network."""
        config = self.optimizer_config(network)
        if isinstance(config, AvaGradConfig):
            return AvaGrad(params, **config.kwargs())
        try:
            return Adam(params, **config.kwargs())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{network}_optimizer: {error}") from None

    def generator(self, compressed: bool) -> MethodStack:
        """The methods at work on a fresh generator."""
        sizes = ("latent_size", "width", "image_size", "num_channels")
        model = Generator(GeneratorConfig(**{name: getattr(self, name) for name in sizes}))
        configs = self.data.methods() if compressed else []
        return _attach(model, configs, "approx")

    def discriminator(self, compressed: bool) -> MethodStack:
        """The same for a discriminator; its weights are normalized after what methods make of them."""
        model = Discriminator(self.discriminator_width, self.image_size, self.num_channels)
        configs = RunConfig(dataset={}, approx=self.discriminator_approx).methods() if compressed else []
        stack = _attach(model, configs, "discriminator_approx")
        model.normalize()
        return stack


LEAST = {
    "latent_size": 1,
    "width": 1,
    "discriminator_width": 1,
    "batch_size": 2,
    "steps": 1,
    "n_critic": 1,
    "samples": 2,
    "evaluate_every": 1,
    "save_every": 1,
    "feature_size": 1,
    "feature_epochs": 1,
    "seed": 0,
}
"""Whole numbers of the config, and the smallest that each can be."""


def _attach(model: nn.Module, configs: list[MethodConfig], where: str) -> MethodStack:
    for method in [config.build() for config in configs]:
        if method.resizes or method.shares:
            raise ConfigError(f"{where}: {method.name} changes which weights there are; this recipe cannot use it.")
    try:
        return attach(model, configs)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
