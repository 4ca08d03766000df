"""Packed models in formats that other engines read."""

from pathlib import Path

from hf_approx.exports.compressed import GROUP_SIZES, export_compressed
from hf_approx.exports.dense import export_dense
from hf_approx.exports.folders import Export, check_output, exported_report, load_model, write_model
from hf_approx.inspection import read_packing
from hf_approx.model_folder import find_checkpoint

__all__ = [
    "FORMATS",
    "GROUP_SIZES",
    "Export",
    "check_output",
    "export_model",
    "exported_report",
    "load_model",
    "write_model",
]

FORMATS = {"dense": export_dense, "compressed-tensors": export_compressed}

ELSEWHERE = {
    "gguf": "llama.cpp's `python convert_hf_to_gguf.py FOLDER`",
    "onnx": "`optimum-cli export onnx --model FOLDER OUT` (package optimum-onnx, which has transformers 4)",
}
"""Formats whose own converters start from a dense checkpoint."""


def export_model(
    source: str | Path,
    output: str | Path,
    format: str = "dense",
    dtype: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Export:
    """Write a packed model in a format that is read without hf_approx.

    Tokenizer and processor files come along, and what was measured of the model, for its card. The folder appears
    whole or not at all.

    Args:
        source: Folder of a packed model, or a Hub repository id.
        output: Folder to write; must not exist or be empty.
        format: `"dense"`: an ordinary transformers checkpoint, exactly the weights that hf_approx decodes.
            `"compressed-tensors"`: for vLLM, and for transformers with that package (the extra `export`): quantized
            linear layers as integers of 4 or 8 bits that decode to exactly the same weights, everything else dense.
        dtype: Of the tensors that are not integers, `"float32"`, `"float16"` or `"bfloat16"`; default: the one the
            model computes in, which may be wider than those it is stored in. To a narrower one weights are rounded.
        revision: Branch, tag or commit of a repository; default `main`.
        token: Of the Hub; default: that of `HF_TOKEN` or `hf auth login`.

    Returns:
        What was written, and which packed weights are dense now.

    Raises:
        ValueError: The model is not packed, or the format cannot hold it; nothing is written.
        ModuleNotFoundError: The package of the format is not installed.
        FileNotFoundError: The source is no saved model.
    """
    if format in ELSEWHERE:
        raise ValueError(
            f"hf_approx does not write {format}: export with --format dense, then run {ELSEWHERE[format]}."
        )
    if format not in FORMATS:
        raise ValueError(f"There is no format {format!r}; choose {', '.join(FORMATS)}.")
    output = Path(output)
    check_output(output)
    folder = find_checkpoint(str(source), everything=True, revision=revision, token=token)
    packing = read_packing(folder)
    if packing is None:
        raise ValueError(f"'{source}' is not packed.")
    if packing.structure is not None:
        raise ValueError(
            f"'{source}' has layers of sizes that its architecture's config cannot express: only hf_approx loads it."
        )
    return FORMATS[format](load_model(folder, dtype), folder, output)
