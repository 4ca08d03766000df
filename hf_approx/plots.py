"""Pictures of what a checkpoint holds. Needs matplotlib: `pip install 'hf-approx[plot]'`."""

from pathlib import Path
from typing import Any

from hf_approx.inspection import Inspection, Row
from hf_approx.report import kind_of


def load_pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Plots need matplotlib: pip install 'hf-approx[plot]'.") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_sparsity(inspection: Inspection, path: str | Path) -> None:
    """Draw the sparsity of every packed weight, a bar a layer, coloured by kind of layer.

    Args:
        inspection: Of a packed checkpoint.
        path: Where to write; its ending chooses the format (`.png`, `.pdf`, `.svg`).

    Raises:
        ValueError: Nothing is packed.
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = [row for row in inspection.rows if row.packed]
    if not rows:
        raise ValueError("There is no packed weight to draw.")
    pyplot = load_pyplot()
    rows.sort(key=_position)
    kinds = list(dict.fromkeys(kind_of(row.name) for row in rows))
    colors = dict(zip(kinds, pyplot.get_cmap("tab20").colors * (len(kinds) // 20 + 1), strict=False))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.2 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        axes.barh(i, 100 * row.sparsity, color=colors[kind_of(row.name)])
    axes.axvline(100 * inspection.sparsity, color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.name.removesuffix(".weight") for row in rows], fontsize=7)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("weights removed, %")
    axes.set_title(f"{inspection.sparsity:.1%} of the packed weights are removed", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _position(row: Row) -> list[tuple[int, str]]:
    """Sorts names with their numbers in order: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in row.name.split(".")]
