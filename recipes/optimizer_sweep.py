"""Train at every learning rate and eps with Adam and with AvaGrad, and compare two short searches with the grid.

accelerate launch recipes/optimizer_sweep.py --config recipes/configs/sweep_digits.yaml
"""

import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed, tqdm
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from common import RECIPES, RecipeConfig, command_line, console, overrides, say_saved, write_json
from config_files import ConfigError, read_yaml
from digits import digits
from hf_approx.optim import (
    AvaGrad,
    CompositeOptimizer,
    SearchResult,
    gradient_scale,
    grid_search,
    scaled_lr,
    separable_search,
)
from loading import quiet
from sweep_plots import plot_planes
from text_classification import Recipe

OPTIMIZERS = ("adam", "avagrad")
NAMES = {"adam": "Adam", "avagrad": "AvaGrad"}
SMOKE = ("eps_decades=[-3,0]", "lr_decades=[-3,1]", "lrs_per_decade=1", "seeds=[0]", "epochs=1", "batch_size=256")
"""What `--smoke` overrides: seconds instead of minutes, on digits."""


@dataclass
class SweepRecipe:
    """One YAML file.

    Attributes:
        eps_decades: Smallest and largest power of ten of eps.
        lr_decades: As above, of the learning rate.
        seeds: Every pair is trained once for each; scores are means.
        task: "digits", or "text_classification" for the trainings of that recipe.
        config: Of the text recipe: its YAML file, or the name of one in `recipes/configs`. What it compresses, it
            compresses in every training; `approx=[]` among the options sweeps the dense model.
        options: Overrides of that config, as `--set` takes them.
        metric: "accuracy", "loss", or another that the task measures; a loss is better if it is lower.
        lrs_per_decade: Learning rates, evenly spaced in their logarithm.
        fixed_lr: By optimizer, the learning rate of the first of two one-dimensional searches.
        epochs: Of a training on digits.
        batch_size: As above.
    """

    eps_decades: list[int]
    lr_decades: list[int]
    seeds: list[int]
    task: str = "digits"
    config: str | None = None
    options: list[str] = field(default_factory=list)
    metric: str = "accuracy"
    lrs_per_decade: int = 2
    fixed_lr: dict[str, float] = field(default_factory=lambda: {"adam": 1e-3, "avagrad": 0.1})
    epochs: int = 4
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("eps_decades", "lr_decades"):
            ends = getattr(self, name)
            if len(ends) != 2 or ends[0] > ends[1]:
                raise ValueError(f"{name} must be two powers of ten, the smaller first, got {ends}.")
        for name in ("lrs_per_decade", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}.")
        if not self.seeds:
            raise ValueError("seeds must be integers, at least one.")
        if self.task not in ("digits", "text_classification"):
            raise ValueError(f"task must be digits or text_classification, got {self.task!r}.")
        if (self.config is None) != (self.task == "digits"):
            raise ValueError("config must be given for text_classification, and only for it.")
        if set(self.fixed_lr) != set(OPTIMIZERS) or not all(lr > 0 for lr in self.fixed_lr.values()):
            raise ValueError(f"fixed_lr needs a positive number for adam and for avagrad, got {self.fixed_lr}.")

    @property
    def epsilons(self) -> list[float]:
        """Every decade."""
        low, high = self.eps_decades
        return [float(f"1e{power}") for power in range(low, high + 1)]

    @property
    def lrs(self) -> list[float]:
        """Two significant digits of even steps."""
        (low, high), steps = self.lr_decades, self.lrs_per_decade
        return [float(f"{10 ** (low + i / steps):.1e}") for i in range((high - low) * steps + 1)]


class Task(Protocol):
    """Trains a fresh model with one optimizer.

    Attributes:
        alone: Each training is the work of one process, so that those of a launch can share the plane.
    """

    alone: bool

    def train(self, optimizer: str, lr: float, eps: float, seed: int) -> dict[str, float]:
        """Metrics by name, among them `loss`; and `gradient`, the `gradient_scale` at the end."""


class Digits:
    """A small convolutional network on 8 x 8 digits."""

    alone = True

    def __init__(self, config: SweepRecipe, accelerator: Accelerator) -> None:
        if accelerator.mixed_precision == "fp16":
            raise ConfigError(
                "task: digits cannot train in fp16, whose scaled gradients would count as larger; launch with "
                "--mixed_precision no or bf16."
            )
        self.config, self.accelerator = config, accelerator
        self.train_data, self.held_out = digits(accelerator.device)

    def train(self, optimizer: str, lr: float, eps: float, seed: int) -> dict[str, float]:
        """See `Task`."""
        set_seed(seed)
        # GELU, since a ReLU that never fires leaves weights without a gradient, whose rate is 1 / eps.
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        ).to(self.accelerator.device)
        cls = torch.optim.Adam if optimizer == "adam" else AvaGrad
        optim = cls(model.parameters(), lr=lr, eps=eps)
        images, labels = self.train_data.tensors
        steps = math.ceil(len(images) / self.config.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps * self.config.epochs)
        for _ in range(self.config.epochs):
            for batch in torch.randperm(len(images), device=images.device).split(self.config.batch_size):
                with self.accelerator.autocast():
                    loss = cross_entropy(model(images[batch]), labels[batch])
                self.accelerator.backward(loss)
                optim.step()
                optim.zero_grad()
                schedule.step()
        images, labels = self.held_out.tensors
        with torch.no_grad():
            logits = model(images)
        return {
            "loss": float(cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(1) == labels).float().mean()),
            "gradient": gradient_scale(optim),
        }


class Gradient(TrainerCallback):
    """Measures the gradients of a `Trainer`'s last step, without those of masks and precisions."""

    scale = math.nan

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **inputs: Any
    ) -> None:
        """The optimizer is gone once training has ended."""
        if state.global_step >= state.max_steps:
            optimizer = getattr(inputs["optimizer"], "optimizer", inputs["optimizer"])
            task = optimizer.optimizers[0] if isinstance(optimizer, CompositeOptimizer) else optimizer
            self.scale = gradient_scale(task)


class Text:
    """The trainings of `text_classification.py`."""

    alone = False

    def __init__(self, config: SweepRecipe, output_dir: Path) -> None:
        path = next(
            (p for p in (Path(str(config.config)), RECIPES / "configs" / str(config.config)) if p.is_file()), ""
        )
        if not path:
            raise ConfigError(f"config: there is no {config.config}, here or in recipes/configs.")
        self.recipe = Recipe(read_yaml(RecipeConfig, path, config.options), str(output_dir))

    def train(self, optimizer: str, lr: float, eps: float, seed: int) -> dict[str, float]:
        """See `Task`."""
        config = self.recipe.config
        config.optimizer = {**(config.optimizer or {}), "lr": lr, "eps": eps} if optimizer == "avagrad" else None
        config.training["seed"] = seed
        for name in ("learning_rate", "adam_epsilon", "optim"):
            config.training.pop(name, None)
        if optimizer == "adam":
            config.training |= {"learning_rate": lr, "adam_epsilon": eps, "optim": "adamw_torch"}
        trainer = self.recipe.trainer("sweep", compressed=bool(config.approx))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        gradient = Gradient()
        trainer.add_callback(gradient)
        trainer.train()
        measured = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
        return {**measured, "gradient": gradient.scale}


@dataclass
class Findings:
    """Everything the tables and the pictures show.

    Attributes:
        grid: The whole plane, by optimizer.
        searches: Two one-dimensional searches, by optimizer; "adam, scaled" is the one whose rate follows eps.
        gradient: Typical size of Adam's gradients at the smallest eps.
    """

    grid: dict[str, SearchResult]
    searches: dict[str, SearchResult]
    gradient: float


class Sweep:
    """Trains every pair once and looks it up when it is asked for again."""

    def __init__(self, config: SweepRecipe, task: Task, accelerator: Accelerator) -> None:
        self.config, self.task, self.accelerator = config, task, accelerator
        self.measured: dict[tuple[str, float, float], list[dict[str, float]]] = defaultdict(list)

    def run(self) -> Findings:
        """The grid and the searches of both optimizers."""
        config = self.config
        self.measure([(name, lr, eps) for name in OPTIMIZERS for eps in config.epsilons for lr in config.lrs])
        grid = {name: grid_search(self.score(name), config.lrs, config.epsilons) for name in OPTIMIZERS}
        searches = {name: self.search(name, config.fixed_lr[name]) for name in OPTIMIZERS}
        first, lr = config.epsilons[0], config.fixed_lr["adam"]
        runs = self.measured["adam", lr, first]
        gradient = sum(run["gradient"] for run in runs) / len(runs)
        searches["adam, scaled"] = self.search("adam", lambda eps: scaled_lr(lr, first, eps, gradient))
        return Findings(grid, searches, gradient)

    def search(self, name: str, lr: float | Callable[[float], float]) -> SearchResult:
        """Eps at one learning rate, then the learning rate."""
        return separable_search(self.score(name), self.config.lrs, self.config.epsilons, lr)

    def score(self, name: str) -> Callable[[float, float], float]:
        """Mean over seeds of the metric, negated if it is a loss; NaN if a training diverged."""
        sign = -1 if "loss" in self.config.metric else 1

        def score(lr: float, eps: float) -> float:
            if (name, lr, eps) not in self.measured:
                self.measure([(name, lr, eps)])
            runs = self.measured[name, lr, eps]
            if not all(math.isfinite(run["loss"]) for run in runs):
                return math.nan
            return sign * sum(run[self.config.metric] for run in runs) / len(runs)

        return score

    def measure(self, pairs: list[tuple[str, float, float]]) -> None:
        """Train these, shared out over the processes if each training needs only one."""
        jobs = [(*pair, seed) for pair in pairs for seed in self.config.seeds]
        mine = jobs[self.accelerator.process_index :: self.accelerator.num_processes] if self.task.alone else jobs
        done = [(job, self.task.train(*job)) for job in tqdm(mine, desc="trainings", disable=len(jobs) < 10)]
        everywhere = dict(gather_object(done) if self.task.alone else done)
        for name, lr, eps, seed in jobs:
            run = everywhere[name, lr, eps, seed]
            if self.config.metric not in run:
                raise ConfigError(f"metric: the task measures {', '.join(sorted(run))}, not {self.config.metric!r}.")
            self.measured[name, lr, eps].append(run)


def spread(lrs: dict[float, float]) -> float:
    """By what factor the best learning rates of all eps differ."""
    return max(lrs.values()) / min(lrs.values())


def show(found: Findings, config: SweepRecipe) -> None:
    """Print the tables and what to use."""
    output = console()
    sign = -1 if "loss" in config.metric else 1
    best = {name: grid.best_lrs() for name, grid in found.grid.items()}
    table = Table(title="The best learning rate for each eps", show_footer=True)
    table.add_column("eps", "factor between largest and smallest")
    for name in OPTIMIZERS:
        table.add_column(f"{NAMES[name]}: lr", f"{spread(best[name]):,.0f}", justify="right")
        table.add_column(config.metric, justify="right")
    for eps in config.epsilons:
        row = []
        for name in OPTIMIZERS:
            lr = best[name].get(eps)
            row += ["-", "-"] if lr is None else [f"{lr:g}", f"{sign * found.grid[name].scores[lr, eps]:.4f}"]
        table.add_row(f"{eps:g}", *row)
    output.print(table)

    table = Table(title="Two one-dimensional searches against the grid")
    for header in ("optimizer", "search", "pairs tried", "lr", "eps", config.metric):
        table.add_column(header, justify="left" if header in ("optimizer", "search") else "right")
    rows = [(NAMES[name], "grid", found.grid[name]) for name in OPTIMIZERS]
    rows += [
        (NAMES[name], f"eps at lr {config.fixed_lr[name]:g}, then lr", found.searches[name]) for name in OPTIMIZERS
    ]
    rows.append(("Adam", "eps at lr scaled with it, then lr", found.searches["adam, scaled"]))
    for optimizer, search, result in sorted(rows, key=lambda row: row[0]):
        lr, eps = result.best
        table.add_row(optimizer, search, str(result.trainings), f"{lr:.3g}", f"{eps:g}", f"{sign * result.score:.4f}")
    output.print(table)
    for line in suggest(found, config):
        output.print(line, highlight=False)


def suggest(found: Findings, config: SweepRecipe) -> list[str]:
    """What to use: sentences, then lines for a `Trainer`."""
    lr, eps = found.searches["avagrad"].best
    lines = [f"AvaGrad: AvaGradConfig(lr={lr:g}, eps={eps:g}), from {found.searches['avagrad'].trainings} pairs."]
    adam, adam_eps = found.grid["adam"].best
    lines.append(f"Adam: learning_rate={adam:g}, adam_epsilon={adam_eps:g}, from the grid.")
    lines.append(f"Adam at another eps: scaled_lr({adam:g}, {adam_eps:g}, EPS, gradient={found.gradient:.2g}).")
    for name in OPTIMIZERS:
        edge = [f"{eps:g}" for eps, lr in found.grid[name].best_lrs().items() if lr in (config.lrs[0], config.lrs[-1])]
        if edge:
            lines.append(
                f"{NAMES[name]} at eps {', '.join(edge)}: the best lr is the first or last; widen lr_decades."
            )
    return [
        *lines,
        "What to pass beside the rest, one of:",
        f"    TrainingArguments(learning_rate={adam:g}, adam_epsilon={adam_eps:g})",
        f"    ApproxTrainer(optimizer=AvaGradConfig(lr={lr:g}, eps={eps:g}))",
    ]


def results(found: Findings, sweep: Sweep) -> dict[str, Any]:
    """JSON form: every training, and what the searches found."""

    def plain(result: SearchResult) -> dict[str, Any]:
        (lr, eps), lrs = result.best, result.best_lrs()
        return {"lr": lr, "eps": eps, "score": result.score, "pairs": result.trainings, "best_lrs": lrs}

    trainings = [
        {"optimizer": name, "lr": lr, "eps": eps, "seed": seed}
        | {key: value if math.isfinite(value) else None for key, value in run.items()}
        for (name, lr, eps), runs in sweep.measured.items()
        for seed, run in zip(sweep.config.seeds, runs, strict=True)
    ]
    return {
        "config": asdict(sweep.config),
        "gradient": found.gradient,
        "grid": {name: plain(result) for name, result in found.grid.items()},
        "searches": {name: plain(result) for name, result in found.searches.items()},
        "trainings": trainings,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the recipe; returns the exit code."""
    options = command_line(__doc__, "outputs/optimizer_sweep", SMOKE).parse_args(argv)
    quiet()
    folder = Path(options.output_dir)
    try:
        config = read_yaml(SweepRecipe, options.config, overrides(options))
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        task: Task = Digits(config, accelerator) if config.task == "digits" else Text(config, folder)
        sweep = Sweep(config, task, accelerator)
        found = sweep.run()
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if accelerator.is_main_process:
        write_json(folder / "results.json", results(found, sweep))
        planes = {NAMES[name]: found.grid[name] for name in OPTIMIZERS}
        plot_planes(planes, config.metric, folder / "planes.png")
        show(found, config)
        say_saved(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
