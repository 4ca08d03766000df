"""What became of the generators of a comparison: packed files, a model card, a table, pictures."""

import importlib.util
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from transformers import AutoModel

from common import console, weight_bytes, write_json
from gan_config import GanRecipe
from gan_game import generate
from gan_networks import Generator
from hf_approx import AvaGradConfig
from hf_approx.cards import write_card
from hf_approx.files import replacing
from hf_approx.inspection import inspect_checkpoint
from hf_approx.layout import REPORT_FILE
from hf_approx.methods import MethodStack
from hf_approx.plots import load_pyplot, plot_layers, save_figure
from hf_approx.report import describe_layers
from hf_approx.staging import staged

GRID = 10
"""Images on a side of the pictures of samples."""

COMPARED = 64
"""Images by which a loaded generator is compared with the one in memory."""

NOTE = (
    "AutoModel knows the class of this model once gan_networks, a file of hf_approx/recipes, is imported. It makes "
    "images from -1 to 1 of normally distributed latents. The Fréchet distance below is the squared one to held-out "
    "images, of features of a small classifier trained on the same data; it is no FID."
)


def finalize(stack: MethodStack, config: GanRecipe) -> dict[str, Any]:
    """Bake the methods into the generator and make it save packed; without methods it stays as it is.

    Returns:
        What was done, as `ApproxTrainer.approx_report` has it.
    """
    report: dict[str, Any] = {}
    if stack.methods:
        stack.settle()
        methods = stack.labelled().items()
        report["methods"] = [{"label": n, **m.report(), "settings": asdict(m.config)} for n, m in methods]
        names = stack.finalize(config.store_dtype)
        report.update(describe_layers(dict(stack.model.named_parameters()), names, stack.grids))
    optimizer = config.optimizer_config("generator")
    if isinstance(optimizer, AvaGradConfig):
        report["optimizer"] = {"method": "avagrad", **optimizer.kwargs()}
    return report


def save(model: Generator, folder: Path, report: dict[str, Any], distance: float, config: GanRecipe) -> dict[str, Any]:
    """Write the generator, its report and its card, and load it back.

    Args:
        model: As `finalize` left it.
        folder: To write to.
        report: What `finalize` returned.
        distance: Of its images from held-out ones.
        config: Of the run.

    Returns:
        What is on disk: `bits`, `bits_with_metadata` (None if no weight is quantized), `sparsity`, `bytes`,
        `dense_bytes`, `parameters`, and whether what was loaded back makes the same images, `reloaded_equal`.
    """
    about = {"task": "unconditional-image-generation", "note": NOTE, "steps": config.steps, **config.card}
    about.setdefault("model_name", folder.resolve().name)
    evaluation = {"metrics": {"frechet_distance": distance}}
    with staged(folder) as partial:
        model.save_pretrained(partial)
        write_json(partial / REPORT_FILE, {**report, "about": about, "evaluation": evaluation})
        inspection = inspect_checkpoint(partial)
        if any(row.packed for row in inspection.rows) and importlib.util.find_spec("matplotlib") is not None:
            plot_layers(inspection, partial / "layers.png")
        write_card(partial)
    loaded = AutoModel.from_pretrained(folder)
    quantized = sum(inspection.histogram) > 0
    return {
        "bits": inspection.code_bits if quantized else None,
        "bits_with_metadata": inspection.bits if quantized else None,
        "sparsity": inspection.sparsity,
        "bytes": weight_bytes(folder),
        "dense_bytes": inspection.dense_bytes,
        "parameters": sum(param.numel() for param in model.parameters()),
        "reloaded_equal": torch.equal(generate(loaded, COMPARED), generate(model, COMPARED)),
    }


def show(results: dict[str, Any]) -> None:
    """Print the table of the generators, below the distances that say what theirs mean."""
    table = Table(title="Generators, dense against compressed")
    headers = ("images", "Fréchet distance", "bits", "with metadata", "bytes on disk", "dense, same dtype", "reloaded")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right")
    runs, others = results["runs"], results["distances"]
    table.add_row("training images", f"{others['training_images_distance']:.2f}", *["-"] * 5)
    start = next(iter(runs.values()))["curve"][0]["distance"]
    table.add_row("untrained generator", f"{start:.2f}", *["-"] * 5)
    for name, row in runs.items():
        table.add_row(
            name,
            f"{row['distance']:.2f}",
            *("-" if row[bits] is None else f"{row[bits]:.2f}" for bits in ("bits", "bits_with_metadata")),
            f"{row['bytes']:,}",
            f"{row['dense_bytes']:,}",
            "equal" if row["reloaded_equal"] else "NOT EQUAL",
        )
    output = console()
    output.print(table)
    output.print(
        "Squared Fréchet distance to held-out images, of the features of a classifier trained on the same data that "
        f"finds {others['classifier_accuracy']:.1%} of their classes. It is no FID: Inception is not used."
    )


def write_samples(images: Tensor, path: Path) -> None:
    """Draw the first hundred images side by side, each pixel enlarged so that they can be seen.

    Args:
        images: Bytes of shape (N, channels, H, W).
        path: Of a PNG file; its folder is created.
    """
    count = min(len(images), GRID**2)
    side = images.shape[-1]
    channels, rows = images.shape[1], -(-count // GRID)
    canvas = torch.full((channels, rows * (side + 1) + 1, GRID * (side + 1) + 1), 255, dtype=torch.uint8)
    for i, image in enumerate(images[:count]):
        top, left = (place * (side + 1) + 1 for place in divmod(i, GRID))
        canvas[:, top : top + side, left : left + side] = image
    scale = max(1, math.ceil(48 / side))
    canvas = canvas.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = canvas[0].numpy() if channels == 1 else canvas.permute(1, 2, 0).numpy()
    with replacing(path) as file:
        Image.fromarray(array).save(file, "PNG")


def write_pictures(results: dict[str, Any], images: Tensor, folder: Path) -> None:
    """Draw `samples_real.png` and, if matplotlib is installed, `curves.png`: the distance over training."""
    write_samples(images, folder / "samples_real.png")
    try:
        pyplot = load_pyplot()
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, run in results["runs"].items():
        axes.plot(*zip(*((entry["step"], entry["distance"]) for entry in run["curve"]), strict=True), label=name)
    floor = results["distances"]["training_images_distance"]
    axes.axhline(floor, color="black", linestyle=":", linewidth=1, label="training images")
    axes.set(xlabel="steps of the generator", ylabel="squared Fréchet distance", yscale="log")
    axes.legend(fontsize=8)
    save_figure(figure, folder / "curves.png")
