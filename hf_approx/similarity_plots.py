"""Pictures of layer similarity. Needs matplotlib: `pip install 'hf-approx[plot]'`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_approx.plots import label, load_pyplot, save_figure


def plot_similarity(matrices: Mapping[str, Tensor | Sequence[Sequence[float]]], path: str | Path) -> None:
    """Draw similarity matrices as heat maps, side by side on one scale from 0 to 1.

    Args:
        matrices: By title, as `layer_similarity` and `block_similarity` return them, or as nested lists.
        path: Where to write; its ending chooses the format (`.png`, `.pdf`, `.svg`).

    Raises:
        ValueError: There is no matrix.
        ModuleNotFoundError: matplotlib is not installed.
    """
    if not matrices:
        raise ValueError("There is no similarity matrix to draw.")
    pyplot = load_pyplot()
    columns = math.ceil(math.sqrt(len(matrices)))
    rows = math.ceil(len(matrices) / columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(1 + 3 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(matrices) :]:
        axes.set_visible(False)
    for axes, (title, matrix) in zip(grid.flat, matrices.items(), strict=False):
        image = axes.imshow(torch.as_tensor(matrix).tolist(), vmin=0, vmax=1, cmap="viridis")
        axes.set_title(label(title), fontsize=8, parse_math=False)
        axes.set_xlabel("layer", fontsize=7)
        axes.set_ylabel("layer", fontsize=7)
        ticks = range(0, len(matrix), max(1, len(matrix) // 8))
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.tick_params(labelsize=7)
    figure.colorbar(image, ax=grid, label="similarity |cos|", shrink=0.8)
    save_figure(figure, path)
