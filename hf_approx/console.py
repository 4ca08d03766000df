"""What the command line prints of models: tables, and sentences that say what came out and what to try next."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_approx.exports import GROUP_SIZES, Export
from hf_approx.inspection import Inspection, Row
from hf_approx.loops.calibration import Calibration
from hf_approx.loops.distillation import Fidelity
from hf_approx.packing import MAX_BITS
from hf_approx.text import one_line

LITTLE = 0.9
"""Share of predictions as before under which a model is hardly the one it was made from."""
FAR = 0.1
"""The same for outputs that are no predictions: their mean squared difference, over the mean square."""
INTEGER_BITS = 3
"""Weights of at most so many bits are exported as integers of 4."""


def show(result: Inspection, brief: bool = False) -> None:
    """Every tensor, unless `brief`, and totals."""
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
    if not any(row.packed for row in result.rows):
        console.print(f"{result.bytes:,} bytes, nothing of it packed.")
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


def tell_sizes(before: int, after: int, what: str) -> None:
    """Bytes of weight files: of the source, and of what was made of it."""
    if after <= before:
        rate = f"{before / max(after, 1):.2f} times smaller"
    else:
        rate = f"{after / max(before, 1):.2f} times as large"
    print(f"Weight files: {before:,} bytes of the source, {after:,} bytes of {what}: {rate}.")


def tell_quantized(result: Calibration, bits: float, held_out: int) -> None:
    """What quantizing did to the outputs, on how many examples that was measured, and what to try next."""
    print(f"{result.bits:.2f} bits a quantized weight on average.")
    if result.rounded is None or result.calibrated is None:
        print(
            "Weights were rounded to the nearest, and nothing was measured, for want of examples: --calibration FILE "
            "would learn which weights need more bits, and measure the result on a quarter of the examples."
        )
        return
    table = Table(f"on {held_out} held-out examples", "distance from source's outputs", "predictions as source")
    for name, fidelity in (("rounded to the nearest", result.rounded), ("calibrated", result.calibrated)):
        agreement = "-" if fidelity.agreement is None else f"{fidelity.agreement:.2%}"
        table.add_row(name, f"{fidelity.loss:.4g}", agreement)
    Console().print(table)
    if result.taken == "calibrated":
        print("The calibrated weights were written.")
    else:
        print("The weights rounded to the nearest were written: they are closer to the source.")
    taken = result.calibrated if result.taken == "calibrated" else result.rounded
    if _differs(taken):
        more = f"more bits (--bits {min(bits + 1, MAX_BITS):g})" if bits < MAX_BITS else ""
        others = "a scale for every group of inputs (--scale-granularity group), more --samples of what it is for"
        what = f"predicts as the source in {taken.agreement:.0%} of cases" if taken.agreement is not None else ""
        print(
            f"Warning: what was written {what or 'has outputs far from those of the source'}. "
            f"Try {', '.join(filter(None, [more, others]))} or more --steps."
        )


def _differs(fidelity: Fidelity) -> bool:
    if fidelity.agreement is None:
        return not fidelity.loss <= FAR
    return not fidelity.agreement >= LITTLE


def tell_exports(output: Path, max_bits: int | None) -> None:
    """How to get plain files of what was written; `max_bits` is None if nothing is quantized."""
    command = f"hf-approx export {output} OUT --dtype float16"
    print(f"For engines without hf_approx, dense: {command}")
    if max_bits is not None:
        small = max_bits <= INTEGER_BITS
        print(f"With integers of {4 if small else 8} bits: {command} --format compressed-tensors")
        if not small:
            print(f"For integers of 4 bits, weights may have {INTEGER_BITS}: compress with --max-bits {INTEGER_BITS}.")


def tell_export(result: Export, before: int, after: int, dtype: str) -> None:
    """What an export holds.

    Args:
        result: Of the export.
        before: Bytes of the weight files it came from.
        after: Bytes of its own.
        dtype: Of the tensors that are no integers.
    """
    print(f"Wrote {result.folder}: {result.bytes:,} bytes of {'' if result.packed else 'dense '}tensors in {dtype}.")
    tell_sizes(before, after, "this")
    if after > before:
        half = ["--dtype float16 would halve what is no integer"] if dtype == "float32" else []
        integers = [] if result.packed else ["--format compressed-tensors keeps quantized weights small"]
        why = "whole integers and dense tensors take" if result.packed else "dense tensors take"
        print(f"That is more because {why} the space that packing had saved{_hints(half + integers)}.")
    if result.packed:
        each = f"group of {result.group_size} inputs" if result.group_size else "row"
        print(
            f"{len(result.packed)} weights are integers of {result.bits} bits that decode to the same values, with a "
            f"scale for each {each}."
        )
        if result.bits > INTEGER_BITS + 1:
            print(f"For integers of 4 bits, weights may have {INTEGER_BITS}: compress with --max-bits {INTEGER_BITS}.")
        if result.group_size not in (0, *GROUP_SIZES):
            print(f"vLLM has kernels for groups of {', '.join(map(str, GROUP_SIZES))} only.")
    for reason, names in _by_reason(result.dense).items():
        print(f"Dense: '{names[0]}'{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}.")


def _hints(hints: list[str]) -> str:
    return f"; {', and '.join(hints)}" if hints else ""


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _stored_as(row: Row) -> str:
    """The dtype of a tensor's values on disk, or the bits of its codes."""
    present = [k for k, count in enumerate(row.counts) if k and count]
    if not present:
        return row.dtype
    return f"{present[0]} bits" if len(present) == 1 else f"{present[0]}-{present[-1]} bits"
