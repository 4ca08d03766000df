"""Train a GAN with a dense and with a compressed generator, save both, load them back, and print one table.

accelerate launch recipes/image_generation.py --config recipes/configs/digits_gan_bits4.yaml
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor

from common import command_line, overrides, say_saved, weight_bytes, write_json
from config_files import ConfigError, read_yaml
from frechet import fit, squared_distance
from gan_config import SMOKE, GanRecipe
from gan_game import Game, from_pixels, generate
from gan_results import finalize, save, show, write_pictures, write_samples
from image_features import train_features
from loading import quiet
from splits import load_labelled


class Measure:
    """How far images are from held-out ones, by the features of a classifier of the same data.

    Args:
        config: Of the run.
        train: Images and labels the classifier learns from.
        held_out: Images and labels the distance is measured to.
    """

    def __init__(self, config: GanRecipe, train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> None:
        self.network = train_features(
            from_pixels(train[0]), train[1], config.feature_size, config.feature_epochs, PartialState().device
        )
        self.reference = fit(self.network.features(from_pixels(held_out[0])))
        self.facts = {
            "classifier_accuracy": self.network.accuracy(from_pixels(held_out[0]), held_out[1]),
            "training_images_distance": self(train[0]),
        }

    def __call__(self, images: Tensor) -> float:
        """Squared Fréchet distance of images, bytes of shape (N, channels, H, W)."""
        return squared_distance(fit(self.network.features(from_pixels(images))), self.reference)


def pixels(data: Dataset, config: GanRecipe) -> tuple[Tensor, Tensor]:
    """Images of a split, resized, as bytes of shape (N, channels, H, W), and their class numbers."""
    mode, size = {1: "L", 3: "RGB"}[config.num_channels], (config.image_size, config.image_size)
    pictures = [picture.convert(mode).resize(size) for picture in data[config.image_column]]
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    stacked = stacked[:, None] if config.num_channels == 1 else stacked.permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor(data[config.label_column])


class Experiment:
    """The data, and the trainings that are compared on them.

    Args:
        config: Of the run.
        output_dir: For models, pictures, results and checkpoints.
        resume: Go on from the newest checkpoints there.

    Raises:
        ConfigError: The data do not fit the config, or there is nothing to go on from.
    """

    def __init__(self, config: GanRecipe, output_dir: Path, resume: bool = False) -> None:
        self.config, self.output_dir = config, output_dir
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        data = load_labelled(config.data, config.label_column, config.image_column)
        train, held_out = pixels(data["train"], config), pixels(data["validation"], config)
        self.images = train[0]
        wanted = {"dense": config.baseline, "compressed": bool(config.approx)}
        # Made before the first training starts, so that a mistake in the second is reported at once.
        self.games = {
            name: Game(config, name, self.images, name == "compressed", self.distance, self._checkpoints(name), resume)
            for name, there in wanted.items()
            if there
        }
        if resume and not any(game.step for game in self.games.values()):
            raise ConfigError("--resume: there is no checkpoint; set save_every to write some.")
        # The first process measures; the others wait for it at the next step.
        self.measure = Measure(config, train, held_out) if self.state.is_main_process else None

    def _checkpoints(self, name: str) -> Path:
        return self.output_dir / f"{name}-checkpoints"

    def distance(self, images: Tensor) -> float:
        """Of generated images from held-out ones; on the main process."""
        assert self.measure is not None
        return self.measure(images)

    def train(self, name: str) -> dict[str, Any]:
        """Train, save under `name`, and measure what was saved; empty on other processes than the first."""
        game, folder = self.games[name], self.output_dir / name
        model = game.train().to("cpu")
        report = finalize(game.generator.stack, self.config)
        if self.measure is None:
            return {}
        images = generate(model, self.config.samples)
        write_samples(images, self.output_dir / f"samples_{name}.png")
        distance = self.distance(images)
        return {"distance": distance, **save(model, folder, report, distance, self.config), "curve": game.curve}

    def run(self) -> dict[str, Any]:
        """All trainings; the results so far are written after each.

        Returns:
            `config`, `distances` of other images, and for each of `runs` a row of the table and the `curve`; on the
            main process.
        """
        results: dict[str, Any] = {"config": asdict(self.config), "runs": {}}
        for name in self.games:
            results["runs"][name] = self.train(name)
            if self.measure is not None:
                results["distances"] = self.measure.facts
                write_json(self.output_dir / "results.json", results)
        return results


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    options = command_line(__doc__, "outputs/image_generation", SMOKE, resume=True).parse_args(argv)
    quiet()
    folder = Path(options.output_dir)
    try:
        config = read_yaml(GanRecipe, options.config, overrides(options))
        experiment = Experiment(config, folder, options.resume)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = experiment.run()
    if experiment.measure is not None:
        write_pictures(results, experiment.images, folder)
        show(results)
        say_saved(folder, {name: weight_bytes(folder / name) for name in experiment.games})
    return 0


if __name__ == "__main__":
    sys.exit(main())
