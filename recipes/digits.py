"""The handwritten digits that come with scikit-learn: 1,797 images of 8 x 8 pixels."""

import torch
from torch.utils.data import TensorDataset

from common import ConfigError

VALIDATION = 360
"""Of the 1,797 digits; the split is the same for every seed."""


def digits(device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """The digits of scikit-learn as images in [-1, 1], to train and to validate."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the digits come with scikit-learn: pip install 'hf-approx[bench]'") from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    labels = torch.tensor(data.target, device=device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    train, held_out = order[VALIDATION:], order[:VALIDATION]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[held_out], labels[held_out])
