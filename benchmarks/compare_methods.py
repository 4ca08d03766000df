"""Train a recipe dense and with every method, over several seeds, and print a Markdown table.

python benchmarks/compare_methods.py --config recipes/configs/words_sparse90.yaml --seeds 0 1 2
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "text_classification.py"


def methods(config: dict[str, Any], sparsity: float) -> dict[str, list[dict[str, Any]]]:
    """The `approx` option of each competitor: the config's own methods against the baselines."""
    own = [{**options, "target_sparsity": sparsity} for options in config["approx"]]
    return {
        "dense": [],
        "Continuous Sparsification": own,
        "gradual magnitude": [{"method": "magnitude", "target_sparsity": sparsity}],
    }


def run(config: Path, approx: list[dict[str, Any]], seed: int, threads: int, overrides: list[str]) -> dict[str, Any]:
    """One training in a process of its own; returns its row of the recipe's results."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"approx={json.dumps(approx)}", f"baseline={str(not approx).lower()}", f"training.seed={seed}"]
        command = [sys.executable, str(RECIPE), "--config", str(config), "--output_dir", folder]
        for option in [*options, *overrides]:
            command += ["--set", option]
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if result.returncode:
            raise RuntimeError(f"A run failed:\n{result.stderr[-3000:]}")
        return json.loads((Path(folder) / "results.json").read_text())["compressed" if approx else "dense"]


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{mean(values):.4f} ± {stdev(values) if len(values) > 1 else 0:.4f}"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="config of recipes/text_classification.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--metric", default="accuracy", help="the number of the recipe's results to show")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the config")
    parser.add_argument("--output", type=Path, help="also write every number as JSON")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())

    tasks = [
        (sparsity, name, seed, approx)
        for sparsity in options.sparsity
        for name, approx in methods(config, sparsity).items()
        if approx or sparsity == options.sparsity[0]
        for seed in options.seeds
    ]
    threads = max((os.cpu_count() or 1) // options.jobs, 1)
    bar = tqdm(total=len(tasks), desc="trainings")

    def work(task: tuple[float, str, int, list[dict[str, Any]]]) -> dict[str, Any]:
        sparsity, name, seed, approx = task
        row = run(options.config, approx, seed, threads, options.set)
        bar.update()
        return {"target": sparsity if approx else 0.0, "method": name, "seed": seed, **row}

    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(work, tasks))
    bar.close()
    if options.output:
        options.output.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"| method | sparsity | {options.metric} | seeds | bytes on disk | dense, same dtype | file / bound |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for key in dict.fromkeys((row["target"], row["method"]) for row in rows):
        group = [row for row in rows if (row["target"], row["method"]) == key]
        print(
            f"| {key[1]} | {mean(r['sparsity'] for r in group):.2%} | {spread([r[options.metric] for r in group])} "
            f"| {len(group)} | {mean(r['bytes'] for r in group):,.0f} | {group[0]['dense_bytes']:,} "
            f"| {mean(r['bytes'] / r['bound_bytes'] for r in group):.3f} |"
        )


if __name__ == "__main__":
    main()
