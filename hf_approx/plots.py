"""Pictures of what a checkpoint holds. Needs matplotlib: `pip install 'hf-approx[plot]'`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_approx.files import replacing
from hf_approx.inspection import Inspection, Row
from hf_approx.report import kind_of
from hf_approx.text import one_line

DPI, MAX_PIXELS = 150, 60_000
"""Pictures with more pixels on a side cannot be drawn: with a thousand layers there are fewer of them to the inch."""
MAX_LABEL = 120


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


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure and close it.

    Args:
        figure: Of matplotlib.
        path: Where to write; its ending chooses the format, `.png` if it has none. The file appears whole.

    Raises:
        ValueError: There is no such format.
        OSError: It cannot be written.
    """
    path = Path(path) if Path(path).suffix else Path(f"{path}.png")
    try:
        with replacing(path) as file:
            dpi = min(DPI, MAX_PIXELS / max(figure.get_size_inches()))
            figure.savefig(file, dpi=dpi, format=path.suffix.removeprefix(".").lower())
    finally:
        load_pyplot().close(figure)


def label(text: str) -> str:
    """A name that comes from a file, as a label that fits a picture; draw it with `parse_math=False`."""
    text = one_line(text)
    return text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL // 2]}...{text[-MAX_LABEL // 2 :]}"


@dataclass(frozen=True)
class _Panel:
    """A bar for every row, and a dotted line at their mean."""

    rows: list[Row]
    values: list[float]
    mean: float
    limit: float
    label: str
    title: str


def plot_layers(inspection: Inspection, path: str | Path) -> None:
    """Draw what there is of `plot_sparsity` and `plot_bits`, side by side if both; see there."""
    _draw([_sparsity(inspection), _bits(inspection)], path)


def plot_sparsity(inspection: Inspection, path: str | Path) -> None:
    """Draw the sparsity of every sparse weight, a bar a layer, coloured by kind of layer.

    Args:
        inspection: Of a packed checkpoint.
        path: Where to write; its ending chooses the format (`.png`, `.pdf`, `.svg`).

    Raises:
        ValueError: No weight is sparse.
        ModuleNotFoundError: matplotlib is not installed.
    """
    _draw([_sparsity(inspection)], path)


def plot_bits(inspection: Inspection, path: str | Path) -> None:
    """Draw the bits a weight of every quantized weight, everything included, a bar a layer, coloured by kind of layer.

    Args:
        inspection: Of a packed checkpoint.
        path: Where to write; its ending chooses the format (`.png`, `.pdf`, `.svg`).

    Raises:
        ValueError: No weight is quantized.
        ModuleNotFoundError: matplotlib is not installed.
    """
    _draw([_bits(inspection)], path)


def _sparsity(inspection: Inspection) -> _Panel:
    packed = [row for row in inspection.rows if row.packed and not row.bank]
    rows = [row for row in packed if row.sparsity or not row.counts]
    title = f"{inspection.sparsity:.1%} of the packed weights are removed"
    values = [100 * row.sparsity for row in rows]
    return _Panel(rows, values, 100 * inspection.sparsity, 100, "weights removed, %", title)


def _bits(inspection: Inspection) -> _Panel:
    rows = [row for row in inspection.rows if row.counts]
    title = f"{inspection.bits:.2f} bits a quantized weight"
    values = [row.bits for row in rows]
    return _Panel(rows, values, inspection.bits, max([8.0, *values]), "bits a weight, with metadata", title)


def _draw(panels: list[_Panel], path: str | Path) -> None:
    panels = [panel for panel in panels if panel.rows]
    if not panels:
        raise ValueError("There is no packed weight to draw.")
    pyplot = load_pyplot()
    kinds = list(dict.fromkeys(kind_of(row.name) for panel in panels for row in panel.rows))
    colors = dict(zip(kinds, pyplot.get_cmap("tab20").colors * (len(kinds) // 20 + 1), strict=False))
    longest = max(len(panel.rows) for panel in panels)
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(8 * len(panels), 1.2 + 0.2 * longest), layout="constrained", squeeze=False
    )
    for axes, panel in zip(grid[0], panels, strict=True):
        for i, (row, value) in enumerate(zip(panel.rows, panel.values, strict=True)):
            axes.barh(i, value, color=colors[kind_of(row.name)])
        axes.axvline(panel.mean, color="black", linestyle=":", linewidth=1)
        names = [label(row.name.removesuffix(".weight")) for row in panel.rows]
        axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
        axes.set_xlim(0, panel.limit)
        axes.set_ylim(len(panel.rows) - 0.4, -0.6)
        axes.set_xlabel(panel.label)
        axes.set_title(panel.title, fontsize=10)
    save_figure(figure, path)
