"""Pictures of a training's report. Needs matplotlib: `pip install 'hf-approx[plot]'`."""

from pathlib import Path
from typing import Any

import numpy as np

from hf_approx.plots import label as shown
from hf_approx.plots import load_pyplot, save_figure


def has_history(report: dict[str, Any]) -> bool:
    """Whether the report of a training has anything for `plot_training` to draw."""
    return len(_sparse_labels(report)) > 0


def plot_training(report: dict[str, Any], path: str | Path) -> None:
    """Draw, for every sparsifying method, its sparsity against the request, and its masks over training.

    Args:
        report: `ApproxTrainer.approx_report`, or what was read from `approx_report.json`.
        path: Where to write; its ending chooses the format (`.png`, `.pdf`, `.svg`).

    Raises:
        ValueError: No method of the report has a sparsity that was logged.
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = _sparse_labels(report)
    if not found:
        raise ValueError("The report has no logged sparsity to draw; set logging_steps lower.")
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(len(found), 2, figsize=(10, 3.5 * len(found)), layout="constrained", squeeze=False)
    for (label, requested), (left, right) in zip(found.items(), axes, strict=True):
        _draw_sparsity(left, report["history"], label, requested)
        _draw_masks(figure, right, report["history"], label)
    save_figure(figure, path)


def _sparse_labels(report: dict[str, Any]) -> dict[str, Any]:
    """The methods whose sparsity was logged, with the sparsity that was asked for."""
    logged = {
        key.removesuffix("/sparsity") for e in report.get("history", ()) for key in e if key.endswith("/sparsity")
    }
    methods = {entry["label"]: entry.get("target_sparsity") for entry in report.get("methods", ())}
    return {label: target for label, target in methods.items() if label in logged}


def _draw_sparsity(axes: Any, history: list[dict[str, Any]], label: str, requested: Any) -> None:
    for key, style in (("sparsity", "-"), ("soft_sparsity", "--")):
        points = [(entry["step"], 100 * entry[f"{label}/{key}"]) for entry in history if f"{label}/{key}" in entry]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=key.replace("_", " "))
    if isinstance(requested, float):
        axes.axhline(100 * requested, color="black", linestyle=":", linewidth=1, label="requested")
    axes.set(xlabel="step", ylabel="%", ylim=(0, 100))
    axes.set_title(shown(label), parse_math=False)
    axes.legend(fontsize=8)


def _draw_masks(figure: Any, axes: Any, history: list[dict[str, Any]], label: str) -> None:
    entries = [entry for entry in history if label in entry["masks"]]
    if not entries:
        axes.set_axis_off()
        return
    counts = np.array([entry["masks"][label] for entry in entries], dtype=float)
    shares = np.log10(np.maximum(counts / counts.sum(1, keepdims=True), 1e-5)).T
    image = axes.pcolormesh(range(len(entries)), np.linspace(0, 1, len(shares)), shares, shading="nearest", vmin=-5)
    ticks = np.linspace(0, len(entries) - 1, min(len(entries), 6)).round().astype(int)
    axes.set_xticks(ticks, [entries[i]["step"] for i in ticks])
    axes.set(xlabel="step", ylabel="value of the soft mask", title="masks")
    figure.colorbar(image, ax=axes, label="share of the masks, power of ten")
