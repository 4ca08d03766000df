"""Train an image classifier dense and compressed, save both, load them back, and print one table.

accelerate launch recipes/image_classification.py --config recipes/configs/digits_vit_sparse80.yaml
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from PIL.Image import Image as Picture
from PIL.Image import Transpose
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    ViTImageProcessorPil,
    default_data_collator,
)

from common import RunConfig, check_scratch, fresh_model
from comparison import Classifier, run
from config_files import ConfigError
from hf_approx import ApproxTrainer
from sources import load_part
from splits import load_labelled


@dataclass
class ImageConfig(RunConfig):
    """The YAML file of an image classifier.

    Attributes:
        model: Hub id, folder or `package:NAME/FOLDER` of a pretrained model; or, for one from scratch,
            `{type: vit, ...}` with the options of that configuration.
        image_column: Column of the images.
        label_column: Column of class numbers or names.
        image_size: For a model from scratch, side in pixels images are resized to. Default: the model's own; some,
            such as ResNet, have none. A pretrained model comes with its image processor.
        crop: Smallest part of a training image's shorter side that a random square keeps, up to all of it; each time
            an image is seen it is cut anew. Default: the image as it is.
        flip: Mirror half of the training images left to right.
        metric: A name for `evaluate.load`, or a file beside this one.
    """

    positive = (*RunConfig.positive, "image_size")

    model: str | dict[str, Any]
    image_column: str = "image"
    label_column: str = "label"
    image_size: int | None = None
    crop: float | None = None
    flip: bool = False
    metric: str = "metrics/accuracy_f1.py"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.model, dict):
            check_scratch(self.model, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, "vit or resnet")
        elif self.image_size is not None:
            raise ConfigError("image_size: only for a model from scratch; a pretrained one has its image processor.")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ConfigError(f"crop must be above 0 and at most 1, got {self.crop!r}.")


@dataclass(frozen=True)
class Inputs:
    """Makes a model's inputs of a batch from the data set.

    Attributes:
        processor: Resizes and normalises.
        mode: Of the pictures it gets: "L" is grey.
        image_column: As in `ImageConfig`, like the others.
    """

    processor: BaseImageProcessor
    mode: str
    image_column: str
    label_column: str
    crop: float | None = None
    flip: bool = False

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Pixels, each (channels, height, width), and class numbers."""
        pictures = [self._augment(picture).convert(self.mode) for picture in batch[self.image_column]]
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": list(pixels), "labels": batch[self.label_column]}

    def _augment(self, picture: Picture) -> Picture:
        # torch's random numbers, since each worker of a data loader has its own seed of them.
        if self.crop is not None:
            share, x, y = torch.rand(3).tolist()
            side = math.ceil(min(picture.size) * (self.crop + share * (1 - self.crop)))
            left, top = round(x * (picture.width - side)), round(y * (picture.height - side))
            picture = picture.crop((left, top, left + side, top + side))
        if self.flip and torch.rand(()) < 0.5:
            picture = picture.transpose(Transpose.FLIP_LEFT_RIGHT)
        return picture


class ImageClassifier(Classifier):
    """A classifier on one data set of images."""

    auto: ClassVar[Any] = AutoModelForImageClassification
    config_class = ImageConfig
    smoke = ("max_train_samples=128", "max_eval_samples=64", "training.max_steps=8")
    config: ImageConfig

    def __init__(self, config: ImageConfig, output_dir: str) -> None:
        data = load_labelled(config, config.label_column, config.image_column)
        super().__init__(config, output_dir, data["train"].features[config.label_column].names)
        if isinstance(config.model, dict):
            options = dict(config.model)
            self.model_config = AutoConfig.for_model(options.pop("type"), **self.names, **options)
        else:
            self.model_config = load_part(AutoConfig, config.model, **self.names)
        self.processor = self._processor()
        # Decoded and processed when they are read: a large set of images fits no memory.
        mode = "L" if self._channels() == 1 else "RGB"
        inputs = Inputs(self.processor, mode, config.image_column, config.label_column)
        self.data = {
            "train": data["train"].with_transform(replace(inputs, crop=config.crop, flip=config.flip)),
            "validation": data["validation"].with_transform(inputs),
        }

    def _channels(self) -> int:
        return getattr(self.model_config, "num_channels", 3)

    def _processor(self) -> BaseImageProcessor:
        """The pretrained model's, or one that resizes and scales to [-1, 1]."""
        config = self.config
        if not isinstance(config.model, dict):
            return load_part(AutoImageProcessor, config.model)
        own = getattr(self.model_config, "image_size", None)
        sides = config.image_size or own
        if sides is None:
            raise ConfigError(f"image_size must be given: {config.model['type']} has none of its own.")
        height, width = (sides, sides) if isinstance(sides, int) else sides
        if isinstance(own, int) and (height, width) != (own, own):
            raise ConfigError(f"image_size: the model's is {own}, got {config.image_size}.")
        half = [0.5] * self._channels()
        return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)

    def model(self) -> PreTrainedModel:
        """The pretrained one, with a new head where its classes are others; or one from scratch."""
        return fresh_model(
            self.auto, self.config.model, self.config.dtype, self.model_config, True, config=self.model_config
        )

    def parts(self) -> dict[str, Any]:
        """Images and the metric."""
        return {
            "train_dataset": self.data["train"],
            "eval_dataset": self.data["validation"],
            "processing_class": self.processor,
            "data_collator": default_data_collator,
            "compute_metrics": self.metrics,
        }

    def trainer(
        self, name: str, compressed: bool, model: PreTrainedModel | None = None, **training: Any
    ) -> ApproxTrainer:
        """See `Comparison.trainer`."""
        # The model's inputs are made of columns whose names it does not know.
        return super().trainer(name, compressed, model, **{"remove_unused_columns": False, **training})

    def sample(self, trainer: ApproxTrainer) -> dict[str, Tensor]:
        """The first eight of the validation split."""
        return {"pixel_values": torch.stack(self.data["validation"][:8]["pixel_values"])}


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    return run(ImageClassifier, argv)


if __name__ == "__main__":
    sys.exit(main())
