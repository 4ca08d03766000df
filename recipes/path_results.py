"""What a comparison of networks on shortest paths found: scores, table, pictures."""

import sys
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from hf_approx.plots import load_pyplot, save_figure
from hf_approx.similarity_plots import plot_similarity

BATCH = 256

BANDS = {"trained": "paths as long as trained", "longer": "longer paths"}


@torch.no_grad()
def scores(model: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device) -> dict[str, float]:
    """How well a network marks paths; a cell is marked where its logit is above 0.

    Args:
        model: In eval mode; (N, 2, H, W) -> logits (N, 1, H, W).
        inputs: Shape (N, 2, H, W).
        targets: Shape (N, 1, H, W), 1 on the paths.
        device: Of the model.

    Returns:
        `f1`, over all cells of all grids together, and `exact`, the share of grids without a wrong cell.
    """
    hits = marked = right = 0.0
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        found, wanted = model(x.to(device)) > 0, y.to(device) > 0
        hits += float((found & wanted).sum())
        marked += float(found.sum() + wanted.sum())
        right += float((found == wanted).flatten(1).all(1).sum())
    return {"f1": 2 * hits / max(marked, 1.0), "exact": right / len(inputs)}


def steps_to(curve: list[dict[str, Any]], target: float, band: str = "trained") -> int | None:
    """The step of the first evaluation whose F1 is at least the target; None if there is none.

    Args:
        curve: Evaluations in order, each with `step` and, for each band, `f1`.
        target: From 0 to 1.
        band: `"trained"` or `"longer"`.
    """
    return next((entry["step"] for entry in curve if entry[band]["f1"] >= target), None)


def summarize(results: dict[str, dict[str, Any]], target: float) -> dict[str, dict[str, Any]]:
    """For every network: parameters, steps to the target and final scores, each over the seeds.

    Args:
        results: Of every network and seed: `parameters`, `curve`, and `folded` if it shares weights.
        target: F1 on paths as long as trained.
    """
    rows = {}
    for name, runs in results.items():
        curves = [run["curve"] for run in runs.values()]
        rows[name] = {
            "parameters": next(iter(runs.values()))["parameters"],
            "steps": [steps_to(curve, target) for curve in curves],
            **{
                f"{band}_{score}": [curve[-1][band][score] for curve in curves]
                for band in BANDS
                for score in ("f1", "exact")
            },
            "folded": {seed: run["folded"] for seed, run in runs.items() if "folded" in run},
        }
    return rows


def show(rows: dict[str, dict[str, Any]], target: float, console: Console | None = None) -> None:
    """Print the comparison in Markdown, and what folding made of every network that shares weights.

    Args:
        rows: As `summarize` returns them.
        target: The F1 whose steps are reported.
        console: Default: the standard output.
    """
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    columns = ["F1", "exact", "F1, longer", "exact, longer"]
    table = Table("network", "parameters", f"steps to F1 {target:g}", *columns, box=box.MARKDOWN)
    for name, row in rows.items():
        numbers = [_spread(row[f"{band}_{score}"]) for band in BANDS for score in ("f1", "exact")]
        table.add_row(name, f"{row['parameters']:,}", _steps(row["steps"]), *numbers)
    console.print(table)
    folded = Table("network", "seed", "folded into", "parameters", *columns, box=box.MARKDOWN)
    for name, row in rows.items():
        for seed, found in row["folded"].items():
            numbers = [f"{found[band][score]:.3f}" for band in BANDS for score in ("f1", "exact")]
            folded.add_row(name, seed, found["loops"], f"{found['parameters']:,}", *numbers)
    if folded.rows:
        console.print(folded)


def write_plots(results: dict[str, dict[str, Any]], target: float, folder: Path) -> None:
    """Draw `curves.png` and, for networks that share weights, `similarity.png`; without matplotlib, nothing."""
    try:
        plot_curves(results, target, folder / "curves.png")
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return
    matrices = {
        f"{name}, seed {seed}": run["similarity"]
        for name, runs in results.items()
        for seed, run in runs.items()
        if "similarity" in run
    }
    if matrices:
        plot_similarity(matrices, folder / "similarity.png")


def plot_curves(results: dict[str, dict[str, Any]], target: float, path: Path) -> None:
    """Draw F1 over the steps of training: every seed, their mean, and the range from worst to best.

    Args:
        results: As `summarize` takes them.
        target: Drawn as a line.
        path: Where to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    pyplot = load_pyplot()
    figure, grid = pyplot.subplots(1, len(BANDS), figsize=(11, 4), sharey=True, layout="constrained")
    for axes, (band, title) in zip(grid, BANDS.items(), strict=True):
        for i, (name, runs) in enumerate(results.items()):
            curves = [run["curve"] for run in runs.values()]
            steps = [entry["step"] for entry in curves[0]]
            columns = list(zip(*([entry[band]["f1"] for entry in curve] for curve in curves), strict=True))
            for curve in zip(*columns, strict=True):
                axes.plot(steps, curve, color=f"C{i}", linewidth=0.6, alpha=0.5)
            axes.plot(steps, [mean(column) for column in columns], color=f"C{i}", linewidth=2, label=name)
            axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=f"C{i}", alpha=0.15)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
        axes.set_ylim(0, 1)
    grid[0].axhline(target, color="black", linestyle=":", linewidth=1)
    grid[0].set_ylabel("F1 of cells")
    grid[0].legend(fontsize=8)
    save_figure(figure, path)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {pstdev(values):.3f}" if len(values) > 1 else "")


def _steps(steps: list[int | None]) -> str:
    """The mean of those seeds that got there, and how many did not."""
    reached = [step for step in steps if step is not None]
    text = f"{mean(reached):.0f}" if reached else "never"
    if len(reached) > 1:
        text += f" ({min(reached)} to {max(reached)})"
    return text if len(reached) in (0, len(steps)) else f"{text}, {len(reached)} of {len(steps)} seeds"
