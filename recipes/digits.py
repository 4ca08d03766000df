"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 pixels."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from torch.utils.data import TensorDataset

from config_files import ConfigError

VALIDATION = 360
"""Of the 1,797 digits; the split is the same for every seed."""


def digits(device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """The digits of scikit-learn as images in [-1, 1], to train and to validate."""
    images, labels, order = _raw()
    pixels = torch.tensor(images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    targets, order = torch.tensor(labels, device=device), order.to(device)
    train, held_out = order[VALIDATION:], order[:VALIDATION]
    return TensorDataset(pixels[train], targets[train]), TensorDataset(pixels[held_out], targets[held_out])


def load() -> DatasetDict:
    """The same digits as grey pictures.

    Returns:
        `train` and `validation` with columns `image` and `label`.
    """
    images, labels, order = _raw()
    # 16 is the brightest value.
    pixels = (images * (255 / 16)).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    splits = {"train": order[VALIDATION:].numpy(), "validation": order[:VALIDATION].numpy()}
    return DatasetDict(
        {
            split: Dataset.from_dict({"image": list(pixels[where]), "label": labels[where]}, features=features)
            for split, where in splits.items()
        }
    )


def _raw() -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Images with values up to 16, labels, and an order whose first `VALIDATION` are held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits come with scikit-learn: pip install 'hf-approx[bench]'") from None
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    return data.images, data.target, order
