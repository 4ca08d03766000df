"""Features of small images without a pretrained network: those of a classifier trained on the data at hand."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BATCH = 256
SEED = 0
"""Of the classifier, whatever the seed of a run: two runs are measured with the same features."""


class FeatureNetwork(nn.Module):
    """A convolutional classifier; what it knows of an image before the last layer are the features.

    Args:
        channels: Of the images.
        classes: To tell apart.
        size: Number of features.
    """

    def __init__(self, channels: int, classes: int, size: int) -> None:
        super().__init__()
        widths = [channels, 32, 64, 64]
        layers = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
        ]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], size))
        self.head = nn.Linear(size, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, channels, H, W) -> features (N, size)."""
        return self.body(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The same in eval mode, in batches.

        Args:
            images: Shape (N, channels, H, W), on any device.

        Returns:
            Shape (N, size), on the CPU.
        """
        self.eval()
        device = self.head.weight.device
        return torch.cat([self(batch.to(device)).cpu() for batch in images.split(BATCH)])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images whose class it finds."""
        logits = self.head(self.features(images).to(self.head.weight.device))
        return float((logits.argmax(1).cpu() == labels).double().mean())


def train_features(images: Tensor, labels: Tensor, size: int, epochs: int, device: torch.device) -> FeatureNetwork:
    """Train the classifier, the same one every time: Adam, its rate falling to zero along a cosine.

    Args:
        images: Shape (N, channels, H, W).
        labels: Class numbers, shape (N,).
        size: Number of features.
        epochs: How long.
        device: To train on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = FeatureNetwork(images.shape[1], int(labels.max()) + 1, size).to(device)
    generator = torch.Generator().manual_seed(SEED)
    batches = -(-len(images) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(images), generator=generator).chunk(batches):
            loss = cross_entropy(model.head(model(images[part].to(device))), labels[part].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    return model
