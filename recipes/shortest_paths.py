"""Mark the shortest paths on grids with a residual network, its layers independent or mixed from a few templates.

accelerate launch recipes/shortest_paths.py --config recipes/configs/shortest_paths.yaml --output_dir paths
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.optim.lr_scheduler import CosineAnnealingLR

from common import command_line, overrides, say_saved, write_json
from config_files import read_yaml
from hf_approx import fold, layer_similarity
from path_config import SMOKE, PathRecipe
from path_results import scores, show, summarize, write_plots

HELD_OUT = 2**32
"""Seed of the held-out grids; those of trainings are smaller."""

RENORM = HELD_OUT + 1
"""Seed of the grids on which norms are set right after folding."""

RENORM_BATCHES = 50
"""As many, at the norms' momentum of 0.1, leave nothing of the statistics before."""

CHUNK = 16
"""Batches that are drawn at once."""


class Experiment:
    """Trains every network with every seed, on the same grids."""

    def __init__(self, config: PathRecipe) -> None:
        self.config = config
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        generator = torch.Generator().manual_seed(HELD_OUT)
        bands = {"trained": config.stages[-1].distances, "longer": config.longer}
        self.held_out = {name: config.grids.draw(config.held_out, band, generator) for name, band in bands.items()}

    def evaluate(self, model: nn.Module) -> dict[str, dict[str, float]]:
        """F1 and exact matches on paths as long as trained, and on longer ones."""
        model.eval()
        return {name: scores(model, *data, self.accelerator.device) for name, data in self.held_out.items()}

    def train(self, name: str, seed: int) -> tuple[nn.Module, dict[str, Any]]:
        """Train one network, its learning rates falling to zero along a cosine; returns it with its learning curve."""
        config, accelerator = self.config, self.accelerator
        set_seed(seed)
        methods = config.network(name)
        model = methods.model
        total = sum(stage.steps for stage in config.stages)
        optimizer = methods.bind(config.competitors[name].optimizer(methods.parameters()), total)
        scheduler = CosineAnnealingLR(optimizer, total)
        # The order in which convolutions of few channels are fastest.
        model.to(memory_format=torch.channels_last)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        methods.begin()
        generator = torch.Generator().manual_seed(seed * accelerator.num_processes + accelerator.process_index)
        bar = tqdm(total=total, desc=f"{name}, seed {seed}", disable=not accelerator.is_local_main_process)
        step = 0
        curve: list[dict[str, Any]] = []
        for stage in config.stages:
            for i in range(stage.steps):
                if i % CHUNK == 0:
                    inputs, targets = config.grids.draw(CHUNK * config.batch_size, stage.distances, generator)
                part = slice(i % CHUNK * config.batch_size, (i % CHUNK + 1) * config.batch_size)
                prepared.train()
                loss = self.loss(prepared, inputs[part], targets[part])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                step += 1
                bar.update()
                if step % config.evaluate_every == 0 or step == total:
                    curve.append({"step": step, **self.evaluate(model)})
                    bar.set_postfix(f1=curve[-1]["trained"]["f1"])
        bar.close()
        model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        methods.bake()
        accelerator.free_memory()
        return model, {"parameters": sum(p.numel() for p in model.parameters()), "curve": curve}

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross entropy of every cell, those on a path weighted."""
        device = self.accelerator.device
        weight = torch.tensor(self.config.positive_weight, device=device)
        return binary_cross_entropy_with_logits(model(inputs.to(device)), targets.to(device), pos_weight=weight)

    def folding(self, model: nn.Module) -> dict[str, Any]:
        """Which loops folding finds, and what the folded network still does once its norms have seen new data.

        The statistics of the norms are those of the weights before folding; no weight is trained after it.
        """
        config = self.config
        folded = copy.deepcopy(model)
        report = fold(folded, config.fold_threshold)
        folded.train()
        generator = torch.Generator().manual_seed(RENORM)
        inputs, _ = config.grids.draw(RENORM_BATCHES * config.batch_size, config.stages[-1].distances, generator)
        with torch.no_grad():
            for batch in inputs.to(self.accelerator.device).split(config.batch_size):
                folded(batch)
        loops = {stack: ", ".join(map(str, found)) for stack, found in report.loops.items()}
        return {"loops": loops["layers"], "parameters": report.parameters_after, **self.evaluate(folded)}

    def run(self) -> Iterator[dict[str, dict[str, Any]]]:
        """After every training, what there is so far: results by network and seed.

        Each has `parameters` and `curve`; networks that share weights also `similarity` and `folded`.
        """
        results: dict[str, dict[str, Any]] = {}
        for name, competitor in self.config.competitors.items():
            for seed in self.config.seeds:
                model, result = self.train(name, seed)
                if competitor.sharing is not None:
                    result["similarity"] = layer_similarity(model, "weights")["layers"].tolist()
                    result["folded"] = self.folding(model)
                results.setdefault(name, {})[str(seed)] = result
                yield results


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    options = command_line(__doc__, "outputs/shortest_paths", SMOKE).parse_args(argv)
    folder = Path(options.output_dir)
    try:
        config = read_yaml(PathRecipe, options.config, overrides(options))
        experiment = Experiment(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for results in experiment.run():
        rows = summarize(results, config.target_f1)
        if experiment.accelerator.is_main_process:
            everything = {"config": asdict(config), "summary": rows, "runs": results}
            write_json(folder / "results.json", everything)
    if experiment.accelerator.is_main_process:
        write_plots(results, config.target_f1, folder)
        show(rows, config.target_f1)
        say_saved(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
