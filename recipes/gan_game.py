"""The training of a GAN as a loop on accelerate: two networks, two optimizers, methods on either."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed, tqdm
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.optim.lr_scheduler import LambdaLR

from config_files import ConfigError
from gan_config import GanRecipe
from gan_networks import Generator
from hf_approx.finite import NotFiniteError
from hf_approx.loops.states import MARK, begin_state, end_state, saved_states
from hf_approx.methods import MethodStack

BATCH = 256
"""Images that are generated at once where nothing is trained."""

STATE_VERSION = 2
"""Of the states a training goes on from."""

DISCRIMINATOR, GENERATOR, SAMPLES = range(3)
"""What random numbers are for: steps of the discriminator, of the generator, or images to look at."""


def random(*key: int) -> torch.Generator:
    """Random numbers of their own for every key: a training that is resumed needs no state of any generator."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


def to_pixels(images: Tensor) -> Tensor:
    """From -1 to 1 -> bytes."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def from_pixels(images: Tensor) -> Tensor:
    """Bytes -> from -1 to 1."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def generate(model: Generator, count: int) -> Tensor:
    """Images of the same latents every time.

    Returns:
        Bytes of shape (count, channels, H, W), on the CPU. The model is in eval mode afterwards.
    """
    model.eval()
    latents = torch.randn(count, model.config.latent_size, generator=random(SAMPLES))
    return torch.cat([to_pixels(model(batch.to(model.device))).cpu() for batch in latents.split(BATCH)])


class Player:
    """One of the two networks, the methods at work on it, and its optimizer.

    Its learning rate falls linearly to zero. What methods train has Adam, as in `ApproxTrainer`.

    Args:
        name: `"generator"` or `"discriminator"`.
        stack: The methods at work on the network.
        steps: How many it takes.
        config: Of the run.
        accelerator: Of this training alone.
    """

    def __init__(self, name: str, stack: MethodStack, steps: int, config: GanRecipe, accelerator: Accelerator) -> None:
        self.name, self.stack, self.accelerator = name, stack, accelerator
        self.plain = stack.model
        self.trained = [param for param in self.plain.parameters() if param.requires_grad]
        optimizer = stack.bind(config.optimizer(name, stack.parameters()), steps)
        self.scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)
        self.model, self.optimizer = accelerator.prepare(self.plain, optimizer)
        stack.begin()
        # Prepared, it would take a step for every process.
        accelerator.register_for_checkpointing(self.scheduler)

    def step(self, index: int, loss: Callable[[int], Tensor]) -> Tensor:
        """Take step `index`, from 0, whose loss that of the index is; returns it, without penalties."""
        value = loss(index)
        self.accelerator.backward(value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return value.detach()

    @contextmanager
    def frozen(self) -> Iterator[nn.Module]:
        """Within, gradients pass through the network and none is kept; so no process waits for those of others."""
        for param in self.trained:
            param.requires_grad_(False)
        try:
            yield self.plain
        finally:
            for param in self.trained:
                param.requires_grad_(True)


class Game:
    """One training, dense or compressed, with the hinge loss.

    Args:
        config: Of the run.
        name: Of the training, for its progress bar.
        images: To learn from: bytes of shape (N, channels, H, W), on the CPU.
        compressed: Whether the methods of the config are at work.
        distance: Of generated images from real ones, given as bytes; called on the main process.
        checkpoints: Folder for the state of the training.
        resume: Go on from the newest state in that folder, if there is one.

    Raises:
        ConfigError: Accelerate's settings do not fit, or the folder has states of another run.
    """

    def __init__(
        self,
        config: GanRecipe,
        name: str,
        images: Tensor,
        compressed: bool,
        distance: Callable[[Tensor], float],
        checkpoints: Path | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.name, self.images, self.distance = config, name, images, distance
        self.checkpoints = checkpoints
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        if self.accelerator.mixed_precision == "fp16" or self.accelerator.gradient_accumulation_steps != 1:
            raise ConfigError("This recipe trains with bf16 or no mixed precision, and no gradient accumulation.")
        set_seed(config.seed)
        self.generator = Player("generator", config.generator(compressed), config.steps, config, self.accelerator)
        critic, steps = config.discriminator(compressed), config.steps * config.n_critic
        self.discriminator = Player("discriminator", critic, steps, config, self.accelerator)
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.losses: dict[str, Tensor] = {}
        self.accelerator.register_for_checkpointing(self)
        if resume and (state := self._newest()) is not None:
            if (state / MARK).read_text(encoding="utf-8") != self._identity():
                raise ConfigError(
                    f"--resume: {state} is of another config or version; resume with those it was started with."
                )
            self.accelerator.load_state(str(state))

    def _random(self, purpose: int, index: int) -> torch.Generator:
        return random(purpose, self.config.seed, index, self.accelerator.process_index)

    def _latents(self, generator: torch.Generator) -> Tensor:
        config = self.config
        return torch.randn(config.batch_size, config.latent_size, generator=generator).to(self.accelerator.device)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """What step `index` of the discriminator sees on this process: images and latents."""
        generator = self._random(DISCRIMINATOR, index)
        chosen = torch.randint(len(self.images), (self.config.batch_size,), generator=generator)
        return from_pixels(self.images[chosen].to(self.accelerator.device)), self._latents(generator)

    def _discriminator_loss(self, index: int) -> Tensor:
        real, latents = self.batch(index)
        with torch.no_grad():
            fake = self.generator.model(latents)
        # In one pass: on several processes each pass writes to buffers that the backward pass of another needs.
        real_scores, fake_scores = self.discriminator.model(torch.cat([real, fake])).chunk(2)
        return relu(1 - real_scores).mean() + relu(1 + fake_scores).mean()

    def _generator_loss(self, index: int) -> Tensor:
        latents = self._latents(self._random(GENERATOR, index))
        with self.discriminator.frozen() as discriminator:
            return -discriminator(self.generator.model(latents)).mean()

    def train(self) -> Generator:
        """Train to the end; returns the generator, the same on every process, its methods still attached."""
        config, accelerator = self.config, self.accelerator
        bar = tqdm(
            total=config.steps, initial=self.step, desc=self.name, disable=not accelerator.is_local_main_process
        )
        if self.step == 0:
            self._evaluate(bar)
        while self.step < config.steps:
            try:
                self._turn(bar)
            except NotFiniteError as error:
                raise NotFiniteError(f"{self.name}: training diverged by step {self.step}: {error}") from None
        bar.close()
        model = accelerator.unwrap_model(self.generator.model, keep_fp32_wrapper=False)
        for buffer in model.buffers():
            # Each process has the statistics of its own last batch.
            buffer.copy_(broadcast(buffer))
        return model

    def _turn(self, bar: tqdm) -> None:
        """One step of the generator, after those of the discriminator."""
        config = self.config
        for i in range(config.n_critic):
            turn = self.step * config.n_critic + i
            self.losses["discriminator"] = self.discriminator.step(turn, self._discriminator_loss)
        self.step += 1
        self.losses["generator"] = self.generator.step(self.step - 1, self._generator_loss)
        bar.update()
        last = self.step == config.steps
        if self.step % config.evaluate_every == 0 or last:
            self._evaluate(bar)
        if config.save_every is not None and (self.step % config.save_every == 0 or last):
            self._save()

    def _refuse_diverged(self) -> None:
        for player in (self.generator, self.discriminator):
            player.stack.refuse_diverged(player.name)

    def _evaluate(self, bar: tqdm) -> None:
        """Measure the generator without noise and add that to the curve."""
        self._refuse_diverged()
        if self.accelerator.is_main_process:
            with self.generator.stack.evaluating():
                found = self.distance(generate(self.generator.plain, self.config.samples))
            numbers = [method.metrics() for method in self.generator.stack.methods]
            losses = {f"{name}_loss": float(loss) for name, loss in self.losses.items()}
            self.curve.append(
                {"step": self.step, "distance": found, **losses, **{k: v for each in numbers for k, v in each.items()}}
            )
            bar.set_postfix(distance=round(found, 2))
        for player in (self.generator, self.discriminator):
            player.model.train()

    def state_dict(self) -> dict[str, Any]:
        """The state that is in neither network nor optimizer."""
        stacks = [player.stack.state_dict() for player in (self.generator, self.discriminator)]
        return {"step": self.step, "curve": self.curve, "stacks": stacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.step, self.curve = state["step"], state["curve"]
        for player, saved in zip((self.generator, self.discriminator), state["stacks"], strict=True):
            player.stack.load_state_dict(saved)

    def _save(self) -> None:
        """Write the state, then delete older ones."""
        if self.checkpoints is None:
            return
        self._refuse_diverged()
        folder = self.checkpoints / f"step-{self.step}"
        if self.accelerator.is_main_process:
            begin_state(folder)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            end_state(folder, self._identity())
        self.accelerator.wait_for_everyone()

    def _newest(self) -> Path | None:
        """The last state that was written to its end."""
        if self.checkpoints is None:
            return None
        states = saved_states(self.checkpoints, "step")
        return states[-1] if states else None

    def _identity(self) -> str:
        """What a state must have in common with the training that goes on from it."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("save_every", "baseline", "card")}
        identity = {"config": config, "processes": self.accelerator.num_processes, "version": STATE_VERSION}
        return json.dumps(identity, sort_keys=True)
