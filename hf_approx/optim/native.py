"""AvaGrad's step on a CPU in one pass over memory: C++ that the compiler of this machine builds once a process."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_approx.logs import get_logger
from hf_approx.optim.kernels import Batch

logger = get_logger(__name__)

ELEMENTS = 1 << 22
"""From how many weights of a model on the compiler, about a second of one core, is called."""

SOURCE = Path(__file__).with_name("step.cpp")

# Numbers stay IEEE's, and equal formulas have equal results in both of the source's passes.
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-shared", "-fPIC")
NUMBERS = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")

KERNELS: dict[tuple[torch.dtype, ...], tuple[str, str]] = {
    (torch.float32,) * 4: ("step_float32", "norm_float32"),
    (torch.float64,) * 4: ("step_float64", "norm_float64"),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32): ("step_bfloat16", "norm_float32"),
}
"""Functions for dtypes of weights, gradients, means and squares."""


RULE = ("beta1", "beta2", "eps", "l2", "decay", "maximize", "root", "correction", "moves", "norm_root", "norm_of_old")
"""What the source's `Rule` has of ours, in its order."""


def takes(batch: Batch) -> bool:
    """Whether the batch is one for this pass, and a compiler built it."""
    fits = batch.foreach and batch.dense and batch.device.type == "cpu" and batch.dtypes in KERNELS
    return fits and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The functions of `step.cpp`; None, after a warning, where no compiler can build them."""
    problem = "none was found"
    # Built for the processor it runs on, and for this process only: nothing is left for another machine to load.
    with tempfile.TemporaryDirectory(prefix="hf_approx-") as folder:
        built = Path(folder, "step.so")
        for command in _commands():
            try:
                subprocess.run(
                    [*command, *NUMBERS, str(SOURCE), "-o", str(built)], check=True, capture_output=True, timeout=120
                )
                return ctypes.CDLL(str(built))
            except subprocess.CalledProcessError as error:
                problem = f"{command[0]}: {error.stderr.decode(errors='replace').strip().splitlines()[:1]}"
            except (OSError, subprocess.TimeoutExpired) as error:
                problem = f"{command[0]}: {error}"
    logger.warning(
        "AvaGrad: no C++ compiler could build its pass for CPUs (%s), so steps take several times as long; install "
        "g++, or set CXX.",
        problem,
    )
    return None


def _commands() -> Iterator[list[str]]:
    given = os.environ.get("CXX")
    names = [shlex.split(given)] if given else [[name] for name in ("g++", "c++", "clang++") if shutil.which(name)]
    for name in names:
        yield [*name, *FLAGS, "-march=native"]
        yield [*name, *FLAGS]


def step(batch: Batch, gamma: Tensor | None) -> Tensor:
    """As `kernels.step`; reads 16 and writes 12 bytes a float32 weight, and needs no memory of the model's size."""
    rule = batch.rule
    numbers = (ctypes.c_double * len(RULE))(*(float(getattr(rule, name)) for name in RULE))
    scalars = [_scalar(gamma if gamma is not None else 0.0), _scalar(rule.lr)]
    tensors = [quad[i] for i in range(4) for quad in batch.quads]
    total = _call(KERNELS[batch.dtypes][0], batch, tensors, [numbers, *map(_address, scalars)])
    written = [quad[i] for i in (0, 2, 3) for quad in batch.quads]
    torch.autograd.graph.increment_version(written)
    return total


def norm(batch: Batch) -> Tensor:
    """As `kernels.norm`; its last bit is the one `step` would have left."""
    scalars = [ctypes.c_double(batch.rule.root), ctypes.c_double(batch.rule.eps)]
    return _call(KERNELS[batch.dtypes][1], batch, [quad[3] for quad in batch.quads], scalars)


def _call(name: str, batch: Batch, tensors: list[Tensor], arguments: list[Any]) -> Tensor:
    count = len(batch.quads)
    total = torch.empty((), dtype=torch.float64)
    getattr(library(), name)(
        ctypes.c_int64(count),
        (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors)),
        (ctypes.c_int64 * count)(*(quad[0].numel() for quad in batch.quads)),
        *arguments,
        _address(total),
        ctypes.c_int(torch.get_num_threads()),
    )
    return total


def _scalar(value: float | Tensor) -> Tensor:
    """A float64 number in memory; the number in a tensor is not read here."""
    value = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return value.to("cpu", torch.float64)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
