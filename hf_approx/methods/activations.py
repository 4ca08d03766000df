"""Training the limits and precisions of what layers are given, for `SmolConfig(activations=True)`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_approx.methods.noise import NoiseLaw, draw, noise_key
from hf_approx.methods.precision import initial_limit
from hf_approx.modules.activation import NAME as INSTALLED
from hf_approx.modules.activation import ActivationQuantizer, install, quantized
from hf_approx.modules.bank import Template
from hf_approx.modules.sharded import write
from hf_approx.structures import feature_dim
from hf_approx.targets import Patterns, matches


class NoisyActivation(ActivationQuantizer):
    """Clips to a trained limit and adds noise of a trained size; once precisions are fixed it rounds.

    In the first step it only looks at how large inputs are, to set its limits. Noise of sigma(s) stands for
    p = 1 - log2 sigma(s) bits, as for weights: its largest value, limit * sigma / (2 - sigma) for signed inputs and
    half of that for others, is the largest error of rounding to p bits.

    Args:
        channels: As of `ActivationQuantizer`.
        signed: As of `ActivationQuantizer`.
        features: How many channels the input has.
        initial_bits: Precision every s starts at.
        law: How the noise is distributed.
        seed: Of the noise.
        device: Of the layer.
    """

    key: Tensor
    largest: Tensor
    curvature: Tensor
    bypassed = False

    def __init__(
        self,
        channels: int,
        signed: bool,
        features: int,
        initial_bits: float,
        law: NoiseLaw,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(channels, signed)
        del self.limit
        self.log_limit = nn.Parameter(torch.zeros(channels))
        self.limits = nn.Parameter(torch.full((channels,), initial_limit(initial_bits)))
        self.governs = features / channels
        self.register_buffer("largest", torch.zeros(channels))
        self.register_buffer("curvature", torch.zeros(channels))
        self.law: NoiseLaw = law
        self.seed, self.indices, self.step = seed, [0], 0
        self.register_buffer("key", torch.zeros(1, dtype=torch.int32), persistent=False)
        self.observing, self.frozen = True, False
        self.to(device)

    @torch.no_grad()
    def start(self) -> None:
        """Set the limits to the largest values seen, on any rank, and stop looking."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.largest, torch.distributed.ReduceOp.MAX)
        write(self.log_limit, self.largest.clamp_min(1e-6).log())
        self.observing = False

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        if self.bypassed:
            return x
        if self.observing:
            if self.training:
                self._observe(x.detach())
            # Zeros for gradients: distributed training waits for every parameter.
            return x + 0 * (self.log_limit.sum() + self.limits.sum()).to(x.dtype)
        limit = self.spread(self.log_limit.exp())
        unit = (x.float() / limit).clamp(-1 if self.signed else 0, 1)
        if self.frozen:
            with torch.no_grad():
                error = quantized(unit, self.spread(self.bits), self.signed) - unit
            return ((unit + error) * limit + 0 * self.limits.sum()).to(x.dtype)
        sigma = self.spread(torch.sigmoid(self.limits))
        size = sigma / (2 - sigma) * (1.0 if self.signed else 0.5)
        noise = draw(x.shape, self.key, self.law) if self.training else 0.0
        return ((unit + size * noise) * limit).to(x.dtype)

    def tell(self, step: int) -> None:
        """Say which step of training it is: each has noise of its own."""
        self.key.fill_(noise_key(self.seed, step, self.indices[0]))

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        size = x.abs().float()
        if self.channels > 1:
            largest = size.movedim(self.dim, 0).reshape(self.channels, -1).amax(1)
        else:
            largest = size.amax().reshape(1)
        # A maximum does not change when checkpointing runs the forward pass again.
        torch.maximum(self.largest, largest, out=self.largest)

    def inference(self) -> ActivationQuantizer:
        """What the trained model has in its place."""
        quantizer = ActivationQuantizer(self.channels, self.signed).to(self.log_limit.device)
        quantizer.bits.copy_(self.bits)
        quantizer.limit.copy_(self.log_limit.detach().exp())
        return quantizer


def install_noise(
    modules: Mapping[str, nn.Module],
    per_channel: bool,
    unsigned: Patterns,
    initial_bits: float,
    law: NoiseLaw,
    seed: int,
) -> dict[str, NoisyActivation]:
    """Make every module add noise to its input.

    Args:
        modules: By name.
        per_channel: Whether each channel has a limit of its own.
        unsigned: Modules whose inputs are never negative, in the notation of targets.
        initial_bits: As of `NoisyActivation`.
        law: As of `NoisyActivation`.
        seed: As of `NoisyActivation`.

    Raises:
        ValueError: A module looks its input up or has none, or quantizes it already; no module is changed then.
    """
    lookups = [name for name, module in modules.items() if isinstance(module, (nn.Embedding, Template))]
    if lookups:
        raise ValueError(f"SmolConfig: '{lookups[0]}' has no numbers as input; exclude it, or set no activations.")
    taken = [name for name, module in modules.items() if hasattr(module, INSTALLED)]
    if taken:
        raise ValueError(f"SmolConfig: the inputs of '{taken[0]}' are quantized already; set no activations.")
    installed = {}
    for name, module in modules.items():
        weight = module.get_parameter("weight")
        if isinstance(module, nn.modules.conv._ConvNd):
            features = module.in_channels
        else:
            features = weight.shape[feature_dim(module, "in")]
        channels = features if per_channel else 1
        signed = not matches(name, unsigned)
        quantizer = NoisyActivation(channels, signed, features, initial_bits, law, seed, weight.device)
        install(module, quantizer.train(module.training))
        installed[name] = quantizer
    return installed
