"""Quantize a trained classifier without training it: calibrated SMOL against rounding to the nearest.

python benchmarks/post_training.py OUTPUT/dense --config recipes/configs/words_bits4.yaml --bits 4 3 2 --seeds 0 1 2
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

import hf_approx
from hf_approx.loops import Fidelity, calibrate, round_weights
from hf_approx.loops.calibration import STEPS
from hf_approx.methods import SmolConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))

from common import RecipeConfig, weight_bytes
from config_files import read_yaml
from splits import load_data


def accuracy(model: PreTrainedModel, loader: DataLoader[Any]) -> float:
    """Share of right predictions."""
    right = total = 0
    with torch.no_grad():
        for batch in loader:
            labels = batch.pop("labels")
            right += int((model(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
    return right / total


def saved_bytes(model: PreTrainedModel, names: list[str], grids: dict[str, Any]) -> int:
    """Bytes of the weight file; afterwards the model is what is in it."""
    hf_approx.attach_packing(model, names, grids=grids)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return weight_bytes(folder)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation; one value stands alone."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained classifier")
    parser.add_argument(
        "--config", type=Path, required=True, help="config of recipes/text_classification.py: the data"
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of examples, their order and noise")
    parser.add_argument("--samples", type=int, default=256, help="examples to calibrate on")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    config = read_yaml(RecipeConfig, options.config)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_data(config)
    label = config.label_column
    data = data.map(
        lambda batch: {
            **tokenizer(*(batch[c] for c in config.text_columns), truncation=True, max_length=config.max_length),
            "labels": batch[label],
        },
        batched=True,
        remove_columns=data["train"].column_names,
    )
    collate = DataCollatorWithPadding(tokenizer)
    validation = DataLoader(data["validation"], batch_size=128, collate_fn=collate)

    def load() -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(options.model).eval()

    dense = load()
    print("| model | accuracy | divergence from dense | agreement | bytes on disk |")
    print("| --- | --- | --- | --- | --- |")
    print(f"| dense | {accuracy(dense, validation):.4f} | 0 | 1 | {weight_bytes(options.model):,} |", flush=True)
    for bits in options.bits:
        model, rows = load(), []
        rounding = round_weights(model, SmolConfig(target_bits=bits))
        size, rounded = saved_bytes(model, rounding.names, rounding.grids), accuracy(model, validation)
        for seed in options.seeds:
            model = load()
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(data["train"]), generator=generator)[: options.samples].tolist()
            inputs = data["train"].select(chosen).remove_columns("labels")
            loader = DataLoader(
                inputs, batch_size=options.batch_size, shuffle=True, collate_fn=collate, generator=generator
            )
            smol = SmolConfig(target_bits=bits, seed=seed)
            result = calibrate(model, loader, smol, options.steps, validation)
            before, after = cast(Fidelity, result.rounded), cast(Fidelity, result.calibrated)
            size_after = saved_bytes(model, result.names, result.grids)
            rows.append((accuracy(model, validation), after.loss, cast(float, after.agreement), size_after))
        print(f"| rounded, {bits:g} bits | {rounded:.4f} | {before.loss:.4f} | {before.agreement:.4f} | {size:,} |")
        accuracies, losses, equal, sizes = (list(column) for column in zip(*rows, strict=True))
        print(
            f"| calibrated, {bits:g} bits | {spread(accuracies)} | {spread(losses)} | {spread(equal)} "
            f"| {mean(sizes):,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
