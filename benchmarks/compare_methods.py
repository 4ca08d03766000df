"""Train a recipe dense and with every method, over several seeds, and print a Markdown table.

python benchmarks/compare_methods.py --config recipes/configs/words_sparse90.yaml --sparsity 0.8 0.9 --seeds 0 1 2
python benchmarks/compare_methods.py --config recipes/configs/words_bits4.yaml --bits 2 4 --methods dense config qat
python benchmarks/compare_methods.py --config recipes/configs/words_shared50.yaml --templates 0.5 --methods config tied
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "text_classification.py"

BASELINES: dict[str, dict[str, Any]] = {
    "gradual": {"method": "magnitude"},
    "one-shot": {"method": "magnitude", "ramp_fraction": 0.0},
    "one-shot-layer": {"method": "magnitude", "ramp_fraction": 0.0, "scope": "layer"},
    "movement": {"method": "movement"},
    "soft-movement": {"method": "movement", "mode": "soft"},
    "random": {"method": "magnitude", "criterion": "random"},
}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "qat": {"method": "uniform", "mode": "qat"},
    "round": {"method": "uniform", "mode": "round"},
}
SHARERS: dict[str, dict[str, Any]] = {
    "tied": {"method": "sharing", "coefficients": "fixed"},
    "drop-last": {"method": "layer_dropping", "order": "last"},
    "drop-alternate": {"method": "layer_dropping", "order": "alternate"},
}
METHODS = ("dense", "config", *BASELINES, *QUANTIZERS, *SHARERS)
TITLES = {
    "dense": "dense",
    "gradual": "gradual magnitude",
    "one-shot": "one-shot magnitude",
    "one-shot-layer": "one-shot magnitude, by layer",
    "movement": "movement, top-k",
    "soft-movement": "movement, soft",
    "random": "random",
    "qat": "uniform, trained rounded",
    "round": "uniform, rounded after training",
    "tied": "neighbours tied, as ALBERT",
    "drop-last": "last layers dropped",
    "drop-alternate": "alternate layers dropped",
}


@dataclass(frozen=True)
class Training:
    """One row of the results before it is measured.

    Attributes:
        method: One of `METHODS`.
        measure: What the target is of: "sparsity", "bits" or "templates".
        target: Sparsity, average bits, or templates as a share of the layers; 0 for dense.
        seed: Of the training.
    """

    method: str
    measure: str
    target: float
    seed: int

    def options(self, config: dict[str, Any]) -> list[dict[str, Any]]:
        """The `approx` option of the recipe."""
        if self.method == "dense":
            return []
        if self.method in QUANTIZERS:
            return [{**QUANTIZERS[self.method], "bits": int(self.target)}]
        if self.method == "tied":
            return [{**SHARERS[self.method], "templates": self.target}]
        if self.method in SHARERS:
            return [{**SHARERS[self.method], "target_sparsity": 1 - self.target}]
        own = config["approx"] if self.method == "config" else [BASELINES[self.method]]
        if self.measure == "sparsity":
            return [{**options, "target_sparsity": self.target} for options in own]
        method, field = ("smol", "target_bits") if self.measure == "bits" else ("sharing", "templates")
        return [{**options, field: self.target} if options["method"] == method else options for options in own]


def run(training: Training, options: argparse.Namespace, config: dict[str, Any]) -> dict[str, Any]:
    """One training in a process of its own; returns its row of the recipe's results."""
    approx = training.options(config)
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"approx={json.dumps(approx)}", f"baseline={str(not approx).lower()}"]
        settings += [f"training.seed={training.seed}", *options.set]
        command = [sys.executable, str(RECIPE), "--config", str(options.config), "--output_dir", folder]
        for setting in settings:
            command += ["--set", setting]
        threads = max((os.cpu_count() or 1) // options.jobs, 1)
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if result.returncode:
            raise RuntimeError(f"{training} failed:\n{result.stderr[-3000:]}")
        return json.loads((Path(folder) / "results.json").read_text())["compressed" if approx else "dense"]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation; one value stands alone."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def show(rows: list[dict[str, Any]], metric: str, own_title: str) -> None:
    """Print one table of all rows, and one with a column for each sparsity."""
    titles = {**TITLES, "config": own_title}
    shares = rows[0]["measure"] == "templates"
    size = "parameters" if shares else "sparsity"
    print(f"| method | {size} | bits | {metric} | seeds | bytes on disk | dense, same dtype | file / bound |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["target"], METHODS.index(row["method"]), row["seed"])):
        groups.setdefault((row["method"], row["target"]), []).append(row)
    for (method, _), group in groups.items():
        cells = [
            titles[method],
            f"{group[0]['parameters']:,}" if shares else f"{mean(r['sparsity'] for r in group):.2%}",
            "-" if group[0]["bits"] is None else f"{mean(r['bits'] for r in group):.2f}",
            spread([r[metric] for r in group]),
            str(len(group)),
            f"{mean(r['bytes'] for r in group):,.0f}",
            f"{group[0]['dense_bytes']:,}",
            f"{mean(r['bytes'] / r['bound_bytes'] for r in group):.3f}",
        ]
        print("| " + " | ".join(cells) + " |")
    targets = sorted({target for method, target in groups if method != "dense"})
    if len(targets) < 2:
        return
    unit = "{:g} bits" if rows[0]["measure"] == "bits" else "{:.0%}"
    print(f"\n| {metric} at | " + " | ".join(map(unit.format, targets)) + " |")
    print("| --- |" + " --- |" * len(targets))
    for method in METHODS[1:]:
        cells = [spread([r[metric] for r in groups[method, t]]) if (method, t) in groups else "" for t in targets]
        if any(cells):
            print(f"| {titles[method]} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config of recipes/text_classification.py")
    parser.add_argument("--methods", nargs="+", default=["dense", "config", "gradual"], choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    targets = parser.add_mutually_exclusive_group()
    targets.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    targets.add_argument("--bits", type=float, nargs="+", help="compare quantizers at these average bits instead")
    targets.add_argument("--templates", type=float, nargs="+", help="compare sharers with this share of the weights")
    parser.add_argument("--title", default="Continuous Sparsification", help="what the table calls the config's own")
    parser.add_argument("--metric", default="accuracy", help="the number of the recipe's results to show")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the config")
    parser.add_argument("--output", type=Path, help="JSON lines of every training; those already there are kept")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())

    rows = []
    if options.output is not None and options.output.exists():
        rows = [json.loads(line) for line in options.output.read_text().splitlines()]
    measure = next((name for name in ("bits", "templates") if getattr(options, name)), "sparsity")
    levels = getattr(options, measure)
    done = {Training(row["method"], row["measure"], row["target"], row["seed"]) for row in rows}
    # Seed by seed, so that an interrupted run has compared every method.
    wanted = [
        Training(method, measure, 0.0 if method == "dense" else level, seed)
        for seed in options.seeds
        for level in levels
        for method in options.methods
    ]
    wanted = [training for training in dict.fromkeys(wanted) if training not in done]
    bar = tqdm(total=len(wanted), desc="trainings")

    def work(training: Training) -> dict[str, Any]:
        row = {**asdict(training), **run(training, options, config)}
        if options.output is not None:
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
        bar.update()
        return row

    with ThreadPoolExecutor(options.jobs) as pool:
        rows += pool.map(work, wanted)
    bar.close()
    show(rows, options.metric, options.title)


if __name__ == "__main__":
    main()
