"""The command line: train, compress, inspect, decompress, export, card and push."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from accelerate.commands.config.config_args import default_config_file
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

import hf_approx
from hf_approx.cards import write_card
from hf_approx.checkpoint import attach_packing
from hf_approx.checkpoint.stored import is_rounded
from hf_approx.exports import GROUP_SIZES, check_output, export_model, load_model, write_model
from hf_approx.hub import inspect_source, license_of, push_folder
from hf_approx.inspection import Inspection, Row, inspect_checkpoint, read_packing
from hf_approx.layout import CARD_FILE
from hf_approx.loops.calibration import STEPS, Calibration, calibrate, round_weights
from hf_approx.loops.calibration_data import calibration_batches
from hf_approx.methods import SmolConfig
from hf_approx.model_folder import find_checkpoint
from hf_approx.packing import MAX_BITS
from hf_approx.plots import plot_layers
from hf_approx.targets import never_saved
from hf_approx.text import one_line

app = typer.Typer(
    help="Sparsify and quantize Hugging Face models and ship them small.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Options of recipes and TrainingArguments have underscores, those here hyphens: both are understood.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)

Source = Annotated[str, typer.Argument(help="Folder of a saved model, or a Hub repository id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository; default main.")]
Token = Annotated[str | None, typer.Option(help="Default: that of HF_TOKEN or `hf auth login`.", show_default=False)]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16; default: what the model computes in."),
]
Output = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A recipe's YAML config.")],
    output_dir: Annotated[Path, typer.Option(help="Where models are saved.")] = Path("outputs"),
    recipe: Annotated[str, typer.Option(help="Name of the recipe.")] = "text_classification",
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, overrides the config.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="End in seconds, on a handful of examples.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoints.")] = False,
) -> None:
    """Run a recipe with `accelerate launch`."""
    package = Path(hf_approx.__file__).parent
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package)
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
    for value in set_ or []:
        command += ["--set", value]
    command += [*(["--smoke"] if smoke else []), *(["--resume"] if resume else [])]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def compress(
    source: Source,
    output: Output,
    store_dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")] = "float16",
    bits: Annotated[
        float | None, typer.Option(help="Quantize to so many bits a weight, on average.", show_default=False)
    ] = None,
    max_bits: Annotated[
        int,
        typer.Option(
            help="With --bits: at most so many for any weight; 3 lets it be exported as integers of 4 bits.",
            min=1,
            max=MAX_BITS,
        ),
    ] = MAX_BITS,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="With --bits: what to learn precisions from. A file of texts (.txt, .csv, .json, .jsonl, .parquet) "
            "or, for a model of images, a folder of them.",
            show_default=False,
        ),
    ] = None,
    column: Annotated[str, typer.Option(help="Of the texts in a file with columns.")] = "text",
    samples: Annotated[int, typer.Option(help="Examples to use; a quarter of them only measures.")] = 256,
    steps: Annotated[int, typer.Option(help="Of the calibration.")] = STEPS,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a text, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the examples, their order and the noise.")] = 0,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write a trained model as a packed checkpoint: its zeros packed and, with --bits, its weights quantized.

    Nothing is trained but precisions and scales, on the examples of --calibration: no labels are needed. With --bits
    alone weights are rounded to the nearest.
    """
    for option, given in (("--calibration", calibration is not None), ("--max-bits", max_bits != MAX_BITS)):
        if given and bits is None:
            raise ValueError(f"{option} says how to quantize: give --bits too.")
    check_output(output)
    folder = find_checkpoint(source, everything=True, revision=revision, token=token)
    packing = read_packing(folder)
    if packing is not None:
        state = "a checkpoint of unfinished training" if packing.training else "packed already"
        raise ValueError(f"'{source}' is {state}.")
    model = load_model(folder)
    before = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    saved = [entry for entry in model.named_parameters() if entry[0] not in never_saved(model)]
    names = [name for name, param in saved if param.dim() > 1 and is_rounded(param)]
    result = None
    if bits is not None:
        config = SmolConfig(target_bits=bits, bits=range(1, max_bits + 1), seed=seed)
        if calibration is None:
            result = round_weights(model, config)
        else:
            batches = calibration_batches(model, folder, calibration, column, samples, batch_size, max_length, seed)
            result = calibrate(model, batches[0], config, steps, held_out=batches[1])
    grids = {} if result is None else result.grids
    if not attach_packing(model, names, store_dtype, grids):
        raise ValueError(f"'{source}' has no weight with enough zeros to gain from packing. Sparsify it first.")
    report = {} if result is None else _report(result, source, {"target_bits": bits, "max_bits": max_bits}, token)
    after = write_model(model, folder, output, report=report)
    _show(inspect_checkpoint(output), brief=True)
    if result is not None:
        _tell(result, before, after)


@app.command()
def inspect(
    source: Source,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw sparsity and bits of every layer into this file.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Show shape, sparsity, bits and bytes of every tensor, and totals against dense.

    Of a repository only the config and the headers of the weight files are read.
    """
    result = inspect_source(source, revision, token)
    if plot is not None:
        plot_layers(result, plot)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        _show(result)


@app.command()
def decompress(
    source: Source, output: Output, dtype: Dtype = None, revision: Revision = None, token: Token = None
) -> None:
    """Write a packed checkpoint as an ordinary transformers checkpoint."""
    result = export_model(source, output, dtype=dtype, revision=revision, token=token)
    print(f"Wrote {output}: {result.bytes:,} bytes of dense tensors.")


@app.command()
def export(
    source: Source,
    output: Output,
    format_: Annotated[str, typer.Option("--format", help="dense or compressed-tensors.")] = "dense",
    dtype: Dtype = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write a packed checkpoint for engines that know nothing of hf_approx.

    compressed-tensors is for vLLM and transformers: quantized linear layers as integers, everything else dense.
    """
    result = export_model(source, output, format_, dtype, revision, token)
    print(f"Wrote {output}: {result.bytes:,} bytes of tensors.")
    if result.packed:
        each = f"group of {result.group_size} inputs" if result.group_size else "row"
        print(
            f"{len(result.packed)} weights are integers of {result.bits} bits that decode to the same values, with a "
            f"scale for each {each}."
        )
        if result.group_size not in (0, *GROUP_SIZES):
            print(f"vLLM has kernels for groups of {', '.join(map(str, GROUP_SIZES))} only.")
    for reason, names in _by_reason(result.dense).items():
        print(f"Dense: '{names[0]}'{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}.")


@app.command()
def card(folder: Annotated[Path, typer.Argument(help="A saved model.")]) -> None:
    """Write the model card, README.md, of a saved model, unless one was written by hand."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder.")
    if not write_card(find_checkpoint(str(folder))):
        raise ValueError(f"'{folder / CARD_FILE}' was not written by hf_approx; move it away first.")
    print(f"Wrote {folder / CARD_FILE}.")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")] = None,
    token: Token = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload model",
) -> None:
    """Push a saved model to the Hub, with its model card, in one commit."""
    print(push_folder(folder, repo_id, private=private or None, revision=revision, token=token, message=message))


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _show(result: Inspection, brief: bool = False) -> None:
    # A log or a pipe has no width of its own: names are worth more there than 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 140)
    if not brief:
        table = Table("tensor", "shape", "dtype", "sparsity", "bits/weight", "bytes")
        table.columns[0].overflow = "fold"
        for row in result.rows:
            shape = " x ".join(map(str, row.shape)) or "scalar"
            sparsity = f"{row.sparsity:.2%}" if row.packed and not row.bank else "-"
            # A name comes from a file that anyone may have made: it is no markup, and no code for the terminal.
            table.add_row(
                Text(one_line(row.name)), shape, Text(_stored_as(row)), sparsity, f"{row.bits:.2f}", f"{row.bytes:,}"
            )
        console.print(table)
    if result.format:
        console.print(f"{result.bytes:,} bytes, quantized in the format {one_line(result.format)}.", markup=False)
        return
    console.print(
        f"{result.bytes:,} bytes, {result.dense_bytes / max(result.bytes, 1):.2f} times smaller than dense "
        f"({result.dense_bytes:,} bytes in the same dtypes)."
    )
    if any(row.packed and not row.bank for row in result.rows):
        console.print(
            f"Packed weights: {result.sparsity:.2%} sparse, {result.packed_bytes:,} bytes, "
            f"{result.packed_bytes / max(result.packed_bound_bytes, 1):.3f} times the bound "
            "(entropy of masks and precision maps, kept values, codes, scales)."
        )
    banks = [row.bank for row in result.rows if row.bank]
    if banks:
        console.print(f"Shared weights: {len(banks)} layers mix theirs from {len(set(banks))} banks of templates.")
    weights = sum(result.histogram)
    if weights:
        console.print(
            f"Quantized weights: {result.bits:.3f} bits a weight, {result.code_bits:.3f} of them codes. "
            "Share of these weights by bits:"
        )
        histogram = Table(*map(str, range(len(result.histogram))))
        histogram.add_row(*(f"{count / weights:.2%}" for count in result.histogram))
        console.print(histogram)


def _report(result: Calibration, source: str, settings: dict[str, Any], token: str | None) -> dict[str, Any]:
    """What the card says of a model that was quantized without training."""
    base = None if Path(source).exists() else source
    measured = result.calibrated if result.taken == "calibrated" else result.rounded
    method = "smol" if result.taken == "calibrated" else "rounding"
    entry: dict[str, Any] = {"label": method, "method": method, "settings": settings, "bits": result.bits}
    if measured is not None:
        entry["distance_from_dense"] = measured.loss
        entry["agreement_with_dense"] = measured.agreement
    how = "with precisions learned from examples" if result.taken == "calibrated" else "by rounding to the nearest"
    note = f"Quantized without training, {how}."
    about = {"base_model": base, "license": base and license_of(base, token), "note": note}
    return {"methods": [entry], "about": about}


def _tell(result: Calibration, before: int, after: int) -> None:
    """What quantizing did to size and outputs."""
    print(f"{result.bits:.2f} bits a quantized weight on average; {before:,} bytes of weights before, {after:,} now.")
    if result.rounded is None or result.calibrated is None:
        print("Weights were rounded to the nearest. --calibration FILE would learn which ones need more bits.")
        return
    table = Table("on held-out examples", "distance from dense outputs", "predictions as dense")
    for name, fidelity in (("rounded to the nearest", result.rounded), ("calibrated", result.calibrated)):
        agreement = "-" if fidelity.agreement is None else f"{fidelity.agreement:.2%}"
        table.add_row(name, f"{fidelity.loss:.4g}", agreement)
    Console().print(table)
    if result.taken == "calibrated":
        print("The calibrated weights were written.")
    else:
        print("The weights rounded to the nearest were written: they are closer to the dense model.")


def _stored_as(row: Row) -> str:
    """The dtype of a tensor's values on disk, or the bits of its codes."""
    present = [k for k, count in enumerate(row.counts) if k and count]
    if not present:
        return row.dtype
    return f"{present[0]} bits" if len(present) == 1 else f"{present[0]}-{present[-1]} bits"


def main(argv: list[str] | None = None) -> Any:
    """Entry point: errors a user can act on are one line and exit code 1."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return app(argv)
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError, SafetensorError) as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return sys.exit(1)
