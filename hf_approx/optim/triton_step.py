"""AvaGrad's step on a GPU in one pass over memory: one Triton kernel for all tensors of a batch. Needs triton.

What the kernel reads of a step (numbers, addresses, sizes) is a table that is sent to the device without waiting, so
nothing is compiled again as they change. Addresses of gradients change from step to step, and steps are counted on
the host: a captured graph would repeat old ones.
"""

import struct
from functools import cache, lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_approx.logs import get_logger
from hf_approx.optim.kernels import Batch, Rule

logger = get_logger(__name__)

CHUNK = 8192
"""Elements of one program."""

BLOCK = 1024
"""Of those, what it has in registers at a time."""

NUMBERS = 11
"""How many numbers come before the addresses in a table, as `_numbers` has them."""

WEIGHTS = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _rate(square, scale, eps):  # type: ignore[no-untyped-def]
    return 1.0 / (tl.sqrt(square) * scale + eps)


@triton.jit
def _number(table, i: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(table + i).to(tl.float64, bitcast=True)


@triton.jit
def _pointer(table, i, kind: tl.constexpr, aligned: tl.constexpr):  # type: ignore[no-untyped-def]
    pointer = tl.load(table + i).to(tl.pointer_type(kind))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _step_chunk(  # type: ignore[no-untyped-def]
    table, weights, gradients, means, squares, gamma, lr, start, end,
    weight_type: tl.constexpr, moment_type: tl.constexpr, masked: tl.constexpr, moves: tl.constexpr,
    norm_of_old: tl.constexpr, adds_l2: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    one_minus_beta1, beta2 = _number(table, 0).to(moment_type), _number(table, 1).to(moment_type)
    one_minus_beta2, eps = _number(table, 2).to(moment_type), _number(table, 3).to(moment_type)
    l2, sign = _number(table, 4).to(moment_type), _number(table, 5).to(moment_type)
    scale, norm_scale = _number(table, 6).to(moment_type), _number(table, 7).to(moment_type)
    shrink = (1 - lr * _number(table, 8)).to(moment_type)
    size = (lr * gamma * _number(table, 9)).to(moment_type)
    total = tl.zeros([block], moment_type)
    for first in range(0, chunk, block):
        at = start + first + tl.arange(0, block)
        mask = at < end if masked else None
        weight = tl.load(weights + at, mask=mask).to(moment_type)
        gradient = sign * tl.load(gradients + at, mask=mask).to(moment_type)
        mean = tl.load(means + at, mask=mask)
        old = tl.load(squares + at, mask=mask)
        if adds_l2:
            gradient += l2 * weight
        mean += one_minus_beta1 * (gradient - mean)
        square = beta2 * old + one_minus_beta2 * gradient * gradient
        if moves:
            moved = shrink * weight - size * _rate(old, scale, eps) * mean
            tl.store(weights + at, moved.to(weight_type), mask=mask)
        tl.store(means + at, mean, mask=mask)
        tl.store(squares + at, square, mask=mask)
        rate = _rate(old if norm_of_old else square, norm_scale, eps)
        total += tl.where(at < end, rate * rate, 0.0)
    return tl.sum(total.to(tl.float64))


@triton.jit(do_not_specialize=["tensors"])
def _step(  # type: ignore[no-untyped-def]
    table, owners, gamma, lr, sums, tensors,
    weight_type: tl.constexpr, moment_type: tl.constexpr, aligned: tl.constexpr, lr_is_tensor: tl.constexpr,
    moves: tl.constexpr, norm_of_old: tl.constexpr, adds_l2: tl.constexpr,
    numbers: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = numbers + tl.load(owners + program)
    weights, gradients = _pointer(table, i, weight_type, aligned), _pointer(table, i + tensors, weight_type, aligned)
    means, squares = (
        _pointer(table, i + 2 * tensors, moment_type, aligned),
        _pointer(table, i + 3 * tensors, moment_type, aligned),
    )
    end = tl.load(table + i + 4 * tensors)
    start = (program - tl.load(table + i + 5 * tensors)) * chunk
    factor = tl.load(gamma)
    rate = tl.load(lr).to(tl.float64) if lr_is_tensor else _number(table, 10)
    if start + chunk <= end:
        total = _step_chunk(
            table, weights, gradients, means, squares, factor, rate, start, end,
            weight_type, moment_type, False, moves, norm_of_old, adds_l2, chunk, block,
        )  # fmt: skip
    else:
        total = _step_chunk(
            table, weights, gradients, means, squares, factor, rate, start, end,
            weight_type, moment_type, True, moves, norm_of_old, adds_l2, chunk, block,
        )  # fmt: skip
    tl.store(sums + program, total)


@triton.jit(do_not_specialize=["tensors"])
def _norm(  # type: ignore[no-untyped-def]
    table, owners, sums, tensors,
    moment_type: tl.constexpr, numbers: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    i = numbers + tl.load(owners + program)
    squares = _pointer(table, i + 3 * tensors, moment_type, False)
    end = tl.load(table + i + 4 * tensors)
    start = (program - tl.load(table + i + 5 * tensors)) * chunk
    eps, scale = _number(table, 3).to(moment_type), _number(table, 6).to(moment_type)
    total = tl.zeros([block], moment_type)
    for first in range(0, chunk, block):
        at = start + first + tl.arange(0, block)
        rate = _rate(tl.load(squares + at, mask=at < end, other=0.0), scale, eps)
        total += tl.where(at < end, rate * rate, 0.0)
    tl.store(sums + program, tl.sum(total.to(tl.float64)))


def takes(batch: Batch) -> bool:
    """Whether the batch is one for this pass, and its device runs it."""
    weight, grad, mean, square = batch.dtypes
    fits = batch.foreach and batch.dense and batch.device.type == "cuda" and weight in WEIGHTS and grad == weight
    fits = fits and mean == square and mean == (torch.float64 if weight == torch.float64 else torch.float32)
    return fits and _works(batch.device)


@cache
def _works(device: torch.device) -> bool:
    """Whether a step of one weight runs; warns if it does not."""
    rule = Rule(0.9, 0.99, 0.1, 0.1, 0.0, 0.0, False, 1.0, 1.0, True, 1.0, False)
    one = torch.ones((), device=device)
    try:
        step(Batch(0, rule, True, True, None, [(one, one, one, one)]), one.double())
    except Exception as error:  # whatever compilers and drivers raise; the other form does the same
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("AvaGrad: Triton does not run on %s (%s), so steps take several times as long.", device, reason)
        return False
    return True


def step(batch: Batch, gamma: Tensor | None) -> Tensor:
    """As `kernels.step`; reads 16 and writes 12 bytes a float32 weight, and one number for each `CHUNK` of them."""
    rule, device = batch.rule, batch.device
    lr = rule.lr.detach().to(device, non_blocking=True) if isinstance(rule.lr, Tensor) else None
    factor = torch.ones((), dtype=torch.float64, device=device) if gamma is None else gamma.to(device, torch.float64)
    table, owners, aligned = _table(batch)
    sums = torch.empty(len(owners), dtype=torch.float64, device=device)
    if len(owners):
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _step[(len(owners),)](
                table,
                owners,
                factor,
                factor if lr is None else lr,
                sums,
                len(batch.quads),
                weight_type=WEIGHTS[batch.dtypes[0]],
                moment_type=WEIGHTS[batch.dtypes[2]],
                aligned=aligned,
                lr_is_tensor=lr is not None,
                moves=rule.moves,
                norm_of_old=rule.norm_of_old,
                adds_l2=rule.l2 != 0,
                numbers=NUMBERS,
                chunk=CHUNK,
                block=BLOCK,
            )
    # Autograd is to see that they were written.
    torch.autograd.graph.increment_version([quad[i] for i in (0, 2, 3) for quad in batch.quads])
    return sums.sum()


def norm(batch: Batch) -> Tensor:
    """As `kernels.norm`."""
    table, owners, _ = _table(batch)
    sums = torch.empty(len(owners), dtype=torch.float64, device=batch.device)
    if len(owners):
        with torch.cuda.device(batch.device if batch.device.type == "cuda" else -1):
            _norm[(len(owners),)](
                table,
                owners,
                sums,
                len(batch.quads),
                moment_type=WEIGHTS[batch.dtypes[2]],
                numbers=NUMBERS,
                chunk=CHUNK,
                block=BLOCK,
            )
    return sums.sum()


def _table(batch: Batch) -> tuple[Tensor, Tensor, bool]:
    """What the kernels read, the tensor each program is for, and whether all addresses are multiples of 16."""
    addresses = [quad[i].data_ptr() for i in range(4) for quad in batch.quads]
    numels = tuple(quad[0].numel() for quad in batch.quads)
    owners, firsts = _owners(numels, batch.device)
    table = torch.tensor([*_numbers(batch.rule), *addresses, *numels, *firsts], dtype=torch.int64)
    if batch.device.type != "cpu":
        table = table.pin_memory().to(batch.device, non_blocking=True)
    return table, owners, all(address % 16 == 0 for address in addresses)


@lru_cache(maxsize=64)
def _owners(numels: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, ...]]:
    """For each program its tensor, on the device, and for each tensor its first program."""
    programs = torch.tensor([-(-numel // CHUNK) for numel in numels])
    owners = torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32), programs)
    return owners.to(device), tuple((programs.cumsum(0) - programs).tolist())


def _numbers(rule: Rule) -> tuple[int, ...]:
    """The bits of the numbers a kernel needs: as arguments of its own they would be float32."""
    numbers = [1 - rule.beta1, rule.beta2, 1 - rule.beta2, rule.eps, rule.l2, -1.0 if rule.maximize else 1.0]
    numbers += [1 / rule.root, 1 / rule.norm_root, rule.decay, 1 / rule.correction]
    numbers += [0.0 if isinstance(rule.lr, Tensor) else rule.lr]
    return struct.unpack(f"{NUMBERS}q", struct.pack(f"{NUMBERS}d", *numbers))
