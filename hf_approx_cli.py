"""The command line: train, compress, inspect, decompress, export, card and push.

It is beside the package, not in it, because whoever asks for help should not wait for torch and transformers: what
the commands do is in `hf_approx.commands`, which is imported when there is something to do.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

MAX_BITS, STEPS = 8, 200
"""As in `hf_approx.packing` and `hf_approx.loops.calibration`."""

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
BaseModel = Annotated[
    str | None,
    typer.Option(help="For the card: the Hub repository the model was made from.", show_default=False),
]
License = Annotated[
    str | None,
    typer.Option("--license", help="For the card: as the Hub names it, apache-2.0 say.", show_default=False),
]


def _commands() -> ModuleType:
    from hf_approx import commands

    commands.quiet()
    return commands


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
    raise typer.Exit(_commands().train(config, output_dir, recipe, set_ or [], smoke, resume))


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
    scale_granularity: Annotated[
        str, typer.Option(help="With --bits: what has a scale of its own, a group of inputs, a channel or a tensor.")
    ] = "channel",
    column: Annotated[str, typer.Option(help="Of the texts in a file with columns.")] = "text",
    samples: Annotated[int, typer.Option(help="Examples to use; a quarter of them only measures.")] = 256,
    steps: Annotated[int, typer.Option(help="Of the calibration.")] = STEPS,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 8,
    max_length: Annotated[int, typer.Option(help="Tokens of a text, at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the examples, their order and the noise.")] = 0,
    base_model: BaseModel = None,
    license_: License = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write a trained model as a packed checkpoint: its zeros packed and, with --bits, its weights quantized.

    Nothing is trained but precisions and scales, on the examples of --calibration: no labels are needed. With --bits
    alone weights are rounded to the nearest. A model that is packed already is decoded, and keeps its zeros.
    """
    for option, given in (
        ("--calibration", calibration is not None),
        ("--max-bits", max_bits != MAX_BITS),
        ("--scale-granularity", scale_granularity != "channel"),
    ):
        if given and bits is None:
            raise ValueError(f"{option} says how to quantize: give --bits too.")
    if bits is not None and bits > max_bits:
        raise ValueError(f"--bits {bits:g} is an average, and no weight may have more than --max-bits {max_bits}.")
    _commands().compress(
        source,
        output,
        store_dtype,
        bits,
        max_bits,
        scale_granularity,
        calibration,
        {"column": column, "samples": samples, "batch_size": batch_size, "max_length": max_length, "seed": seed},
        steps,
        {"base_model": base_model, "license": license_},
        revision,
        token,
    )


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
    _commands().inspect(source, as_json, plot, revision, token)


@app.command()
def decompress(
    source: Source,
    output: Output,
    dtype: Dtype = None,
    base_model: BaseModel = None,
    license_: License = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write a packed checkpoint as an ordinary transformers checkpoint."""
    about = {"base_model": base_model, "license": license_}
    _commands().export(source, output, "dense", dtype, about, revision, token)


@app.command()
def export(
    source: Source,
    output: Output,
    format_: Annotated[str, typer.Option("--format", help="dense or compressed-tensors.")] = "dense",
    dtype: Dtype = None,
    base_model: BaseModel = None,
    license_: License = None,
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Write a packed checkpoint for engines that know nothing of hf_approx.

    compressed-tensors is for vLLM and transformers: quantized linear layers as integers, everything else dense.
    """
    about = {"base_model": base_model, "license": license_}
    _commands().export(source, output, format_, dtype, about, revision, token)


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    base_model: BaseModel = None,
    license_: License = None,
) -> None:
    """Write the model card, README.md, of a saved model, unless one was written by hand."""
    _commands().card(folder, {"base_model": base_model, "license": license_})


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A saved model.")],
    repo_id: Annotated[str, typer.Argument(help="USER/NAME on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    base_model: BaseModel = None,
    license_: License = None,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")] = None,
    token: Token = None,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload model",
) -> None:
    """Push a saved model to the Hub, with its model card, in one commit."""
    about = {"base_model": base_model, "license": license_}
    _commands().push(folder, repo_id, private, about, revision, token, message)


def main(argv: list[str] | None = None) -> Any:
    """Entry point: errors a user can act on are one line and exit code 1."""
    try:
        return app(argv)
    except (ValueError, OSError, ModuleNotFoundError, NotImplementedError, SafetensorError) as error:
        from hf_approx.text import one_line

        print(f"error: {one_line(str(error))}", file=sys.stderr)
        return sys.exit(1)
