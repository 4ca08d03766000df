"""Names of the files in a saved model's folder, and which of them are of one model alone."""

import re
from pathlib import Path

CONFIG_FILE = "config.json"
REPORT_FILE = "approx_report.json"
ARGUMENTS_FILE = "training_args.json"
PICKLED_ARGUMENTS_FILE = "training_args.bin"
CARD_FILE = "README.md"
MARKER = (
    "<!-- Written by hf_approx. Remove this line to keep your changes: the next save then leaves the file alone. -->"
)
PICTURES = {
    "layers.png": "Sparsity and bits of every packed layer",
    "training.png": "Sparsity and masks over training",
    "similarity.png": "Similarity of the layers that share templates",
}
WEIGHTS = re.compile(r"model(\.[\w-]+?)??(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")
"""Files of weights and the index of several, with the variant that `save_pretrained(variant=...)` puts between."""


def is_ours(path: Path) -> bool:
    """Whether there is a card that `hf_approx.cards.write_card` wrote and nobody took over by hand."""
    return path.is_file() and MARKER in path.read_text(encoding="utf-8", errors="replace")


def stale_files(old: Path, new: Path) -> set[str]:
    """The files at the top of a model's folder that would be wrong beside the model that takes its place.

    They are weights, report, pictures, a card that nobody edited, and arguments of a training as a pickle. Weights of
    another variant stay where both models have one config, which is what tells how to read them.

    Args:
        old: A folder, of a model or not.
        new: What is to be in its place.
    """
    stale = {REPORT_FILE, *PICTURES, *([CARD_FILE] if is_ours(old / CARD_FILE) else [])}
    if (new / ARGUMENTS_FILE).is_file():
        stale.add(PICKLED_ARGUMENTS_FILE)
    variants = {variant_of(path.name) for path in new.iterdir()} - {None}
    if variants:
        same = _content(old / CONFIG_FILE) == _content(new / CONFIG_FILE)
        found = {path.name: variant_of(path.name) for path in old.iterdir()}
        stale |= {
            name for name, variant in found.items() if variant is not None and not (same and variant not in variants)
        }
    return stale


def variant_of(name: str) -> str | None:
    """The variant that a file of weights is of, empty for the usual one; None for any other file."""
    match = WEIGHTS.fullmatch(name)
    return None if match is None else (match[1] or match[4] or "").removeprefix(".")


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
