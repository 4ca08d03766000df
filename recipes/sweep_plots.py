"""The plane of learning rates and eps as a picture."""

import math
from collections.abc import Mapping
from pathlib import Path

from hf_approx.optim import SearchResult
from hf_approx.plots import load_pyplot, save_figure


def plot_planes(planes: Mapping[str, SearchResult], metric: str, path: str | Path) -> None:
    """Draw grids as heat maps side by side on one scale, the best learning rate of each eps marked.

    Args:
        planes: Full grids, by title; all of the same learning rates and eps. Diverged trainings stay white.
        metric: What the scores are; those of a loss are its negative.
        path: Where to write; its ending chooses the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, grid = pyplot.subplots(
        1, len(planes), figsize=(1 + 4.5 * len(planes), 4.8), sharey=True, squeeze=False, layout="constrained"
    )
    sign = -1 if "loss" in metric else 1
    finite = [sign * score for plane in planes.values() for score in plane.scores.values() if not math.isnan(score)]
    # A loss may be astronomic before it is infinite; beyond twice the median, one colour is enough.
    high = max(finite) if sign > 0 else min(max(finite), 2 * sorted(finite)[len(finite) // 2])
    for axes, (title, plane) in zip(grid.flat, planes.items(), strict=True):
        lrs, epsilons = (list(dict.fromkeys(values)) for values in zip(*plane.scores, strict=True))
        image = axes.imshow(
            [[sign * plane.scores[lr, eps] for eps in epsilons] for lr in lrs],
            origin="lower",
            aspect="auto",
            vmin=min(finite),
            vmax=high,
            cmap="viridis" if sign > 0 else "viridis_r",
        )
        best = plane.best_lrs()
        places = [i for i, eps in enumerate(epsilons) if eps in best]
        heights = [lrs.index(best[epsilons[i]]) for i in places]
        axes.plot(places, heights, "o-", color="red", markersize=5, linewidth=1, label="best lr of each eps")
        axes.set_title(title)
        axes.set_xlabel("eps")
        axes.set_xticks(range(len(epsilons)), [f"{eps:.0e}" for eps in epsilons], rotation=90, fontsize=8)
        axes.set_yticks(range(len(lrs)), [f"{lr:.1e}" for lr in lrs], fontsize=8)
    grid[0, 0].set_ylabel("learning rate")
    grid[0, 0].legend(loc="upper left", fontsize=8)
    figure.colorbar(image, ax=grid, label=f"held-out {metric}")
    save_figure(figure, path)
