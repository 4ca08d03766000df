"""Training the limits and precisions of what layers are given, for `SmolConfig(activations=True)`."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_approx.axes import feature_dim
from hf_approx.methods.noise import NoiseLaw, draw, noise_key
from hf_approx.methods.precision import initial_limit
from hf_approx.modules.activation import NAME as INSTALLED
from hf_approx.modules.activation import ActivationQuantizer, install, quantized
from hf_approx.modules.bank import Template
from hf_approx.modules.sharded import write
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
    phase: Tensor
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
        # The same for what is compiled: one graph does whatever these say, so that none is made in mid-training.
        self.register_buffer("phase", torch.tensor([True, False]), persistent=False)
        self.to(device)

    @torch.no_grad()
    def start(self) -> None:
        """Set the limits to the largest values seen, on any rank, and stop looking."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.largest, torch.distributed.ReduceOp.MAX)
        write(self.log_limit, self.largest.clamp_min(1e-6).log())
        self.observing = False
        self.phase[0].fill_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        if self.bypassed:
            return x
        compiling = torch.compiler.is_compiling()
        if compiling and self.training:
            self._observe(x.detach())
        elif self.observing and not compiling:
            if self.training:
                self._observe(x.detach())
            # Zeros for gradients: distributed training waits for every parameter.
            return x + 0 * (self.log_limit.sum() + self.limits.sum()).to(x.dtype)
        limit = self.spread(self.log_limit.exp())
        unit = (x.float() / limit).clamp(-1 if self.signed else 0, 1)
        if compiling:
            observing, frozen = self.phase.unbind()
            error = torch.where(frozen, self._rounding(unit), self._noise(unit))
            return torch.where(observing, x, ((unit + error) * limit).to(x.dtype))
        if self.frozen:
            return ((unit + self._rounding(unit)) * limit + 0 * self.limits.sum()).to(x.dtype)
        return ((unit + self._noise(unit)) * limit).to(x.dtype)

    @torch.no_grad()
    def _rounding(self, unit: Tensor) -> Tensor:
        return quantized(unit, self.spread(self.bits), self.signed) - unit

    def _noise(self, unit: Tensor) -> Tensor:
        if not self.training:
            return torch.zeros_like(unit)
        sigma = self.spread(torch.sigmoid(self.limits))
        return sigma / (2 - sigma) * (1.0 if self.signed else 0.5) * draw(unit.shape, self.key, self.law)

    def tell(self, step: int, observing: bool, frozen: bool) -> None:
        """Say which step of training it is, as each has noise of its own, and what is done in it."""
        self.key.fill_(noise_key(self.seed, step, self.indices[0]))
        self.observing, self.frozen = observing, frozen
        for tensor, value in zip(self.phase, (observing, frozen), strict=True):
            tensor.fill_(value)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        size = x.abs().float()
        if self.channels > 1:
            largest = size.movedim(self.dim, 0).reshape(self.channels, -1).amax(1)
        else:
            largest = size.amax().reshape(1)
        # A maximum does not change when checkpointing runs the forward pass again.
        torch.maximum(self.largest, torch.where(self.phase[0], largest, 0.0), out=self.largest)

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
