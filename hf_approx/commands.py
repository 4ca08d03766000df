"""What the commands of `hf_approx_cli` do."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.commands.config.config_args import default_config_file

from hf_approx import console
from hf_approx.cards import check_about, describe, write_card
from hf_approx.checkpoint import attach_packing
from hf_approx.checkpoint.stored import is_rounded
from hf_approx.exports import check_output, export_model, exported_report, load_model, write_model
from hf_approx.hub import inspect_source, license_of, push_folder
from hf_approx.inspection import inspect_checkpoint, read_packing
from hf_approx.json_files import read_json
from hf_approx.layout import CARD_FILE
from hf_approx.loops.calibration import Calibration, calibrate, round_weights
from hf_approx.loops.calibration_data import calibration_batches
from hf_approx.methods import SmolConfig
from hf_approx.model_folder import find_checkpoint, weight_files
from hf_approx.packing import SharedSpec
from hf_approx.plots import plot_layers
from hf_approx.targets import never_saved

PACKAGE = Path(__file__).parent
KEPT = ("base_model", "license", "language", "tags")
"""What the card of a model says that holds for one made from it."""

About = Mapping[str, str | None]
"""What to say on the card; see `hf_approx.cards.check_about`."""


def quiet() -> None:
    """Let transformers say only what a user of the command line can do something about."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def train(config: Path, output_dir: Path, recipe: str, settings: list[str], smoke: bool, resume: bool) -> int:
    """Run a recipe; returns its exit code."""
    folder = next((f for f in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if f.is_dir()), PACKAGE)
    # The other files are what these import.
    scripts = {
        path.stem: path for path in folder.glob("*.py") if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    }
    script = scripts.get(recipe)
    if script is None:
        raise FileNotFoundError(f"There is no recipe '{recipe}'; --recipe takes {', '.join(sorted(scripts))}.")
    if not config.is_file():
        raise FileNotFoundError(f"'{config}' does not exist.")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    if not Path(default_config_file).is_file():
        # What accelerate would choose too, after a warning for each.
        processes = max(1, torch.accelerator.device_count())
        command += ["--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    command += [str(script)]
    command += ["--config", str(config), "--output_dir", str(output_dir)]
    for value in settings:
        command += ["--set", value]
    command += [*(["--smoke"] if smoke else []), *(["--resume"] if resume else [])]
    return subprocess.run(command, check=False).returncode


def compress(
    source: str,
    output: Path,
    store_dtype: str,
    bits: float | None,
    max_bits: int,
    scale_granularity: Any,
    calibration: Path | None,
    data: Mapping[str, Any],
    steps: int,
    about: About,
    revision: str | None,
    token: str | None,
) -> None:
    """Pack a model, and quantize it if there are `bits`; `data` is for `calibration_batches`."""
    check_about(about)
    check_output(output)
    folder = find_checkpoint(source, everything=True, revision=revision, token=token)
    packing = read_packing(folder)
    if packing is not None and packing.training:
        raise ValueError(f"'{source}' is a checkpoint of unfinished training.")
    if packing is not None and bits is None and packing.store_dtype == store_dtype:
        raise ValueError(f"'{source}' is packed already, in {store_dtype}: give --bits to quantize it.")
    if packing is not None and any(isinstance(spec, SharedSpec) for spec in packing.tensors.values()):
        raise ValueError(
            f"'{source}' mixes weights from shared templates, which are quantized in training only (SmolConfig on the "
            "templates): decompress it first, and each layer has a weight of its own."
        )
    model = load_model(folder)
    before = _bytes_of(folder)
    saved = [entry for entry in model.named_parameters() if entry[0] not in never_saved(model)]
    names = [name for name, param in saved if param.dim() > 1 and is_rounded(param)]
    result, held_out = None, 0
    if bits is not None:
        config = SmolConfig(
            target_bits=bits,
            bits=range(1, max_bits + 1),
            scale_granularity=scale_granularity,
            seed=data["seed"],
        )
        if calibration is None:
            result = round_weights(model, config)
        else:
            batches = calibration_batches(model, folder, calibration, **data)
            held_out = len(batches[1].dataset)  # type: ignore[arg-type]
            result = calibrate(model, batches[0], config, steps, held_out=batches[1])
    specs = attach_packing(model, names, store_dtype, {} if result is None else result.grids)
    if not specs and packing is None:
        raise ValueError(f"'{source}' has no weight with enough zeros to gain from packing. Sparsify it first.")
    report = _report(folder, source, about, token)
    if result is not None:
        _add_method(report, result, {"target_bits": bits, "max_bits": max_bits})
    write_model(model, folder, output, report=report)
    found = inspect_checkpoint(output)
    console.show(found, brief=True)
    console.tell_sizes(before, _bytes_of(output), "the result")
    if result is not None and bits is not None:
        console.tell_quantized(result, bits, held_out)
    written = read_packing(output)
    if written is not None and written.structure is None and not written.activations:
        console.tell_exports(output, max((k for k, count in enumerate(found.histogram) if count), default=None))


def inspect(source: str, as_json: bool, plot: Path | None, revision: str | None, token: str | None) -> None:
    """Print what is in a model, and draw it."""
    result = inspect_source(source, revision, token)
    if plot is not None:
        plot_layers(result, plot)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        console.show(result)


def export(
    source: str,
    output: Path,
    format_: str,
    dtype: str | None,
    about: About,
    revision: str | None,
    token: str | None,
) -> None:
    """Write a packed model in a format of others."""
    check_about(about)
    result = export_model(source, output, format_, dtype, revision, token)
    describe(output, about)
    before = _bytes_of(find_checkpoint(source, revision=revision, token=token))
    written = dtype or str(read_json(output / "config.json").get("dtype", "float32"))
    console.tell_export(result, before, _bytes_of(output), written)


def card(folder: Path, about: About) -> None:
    """Write the card of a model."""
    check_about(about)
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder.")
    if not write_card(find_checkpoint(str(folder)), about=about):
        raise ValueError(f"'{folder / CARD_FILE}' was not written by hf_approx; move it away first.")
    print(f"Wrote {folder / CARD_FILE}.")


def push(
    folder: Path,
    repo_id: str,
    private: bool,
    about: About,
    revision: str | None,
    token: str | None,
    message: str,
) -> None:
    """Push a model to the Hub."""
    check_about(about)
    done = push_folder(
        folder, repo_id, private=private or None, revision=revision, token=token, message=message, about=about
    )
    print(done)


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in weight_files(folder))


def _report(folder: Path, source: str, about: About, token: str | None) -> dict[str, Any]:
    """What the card says of a model that is made from another: what holds for both, and how that one was made."""
    earlier = exported_report(folder)
    known = {name: value for name, value in earlier.get("about", {}).items() if name in KEPT}
    if not Path(source).exists() and not earlier:
        known |= {"base_model": source, "license": license_of(source, token)}
    known |= {name: value for name, value in about.items() if value}
    # Of the numbers of earlier methods nobody knows whether they still hold.
    methods = [
        {name: entry[name] for name in ("label", "method", "settings") if name in entry}
        for entry in earlier.get("methods", ())
    ]
    report = {"methods": methods} if methods else {}
    return {**report, "about": known} if known else report


def _add_method(report: dict[str, Any], result: Calibration, settings: dict[str, Any]) -> None:
    """Also say how it was quantized."""
    measured = result.calibrated if result.taken == "calibrated" else result.rounded
    method = "smol" if result.taken == "calibrated" else "rounding"
    entry: dict[str, Any] = {"label": method, "method": method, "settings": settings, "bits": result.bits}
    if measured is not None:
        entry["distance_from_dense"] = measured.loss
        entry["agreement_with_dense"] = measured.agreement
    how = "with precisions learned from examples" if result.taken == "calibrated" else "by rounding to the nearest"
    report["methods"] = [*report.get("methods", ()), entry]
    report["about"] = {**report.get("about", {}), "note": f"Quantized without training, {how}."}
