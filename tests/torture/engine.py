"""Cases in forked workers, each under a time and a memory limit, and the table of what came of them.

A worker is a fork of a process that has imported everything and built what the cases start from: a case then costs
what it does and nothing else. One that hangs, dies or takes too much memory is killed, counted, and the next goes on.
"""

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import hf_approx

OUTCOMES = ("fine", "refused", "lost", "wrong")
MEMORY = 3 << 30
"""Bytes that a worker may take beside what it was forked with."""
SECONDS = 20.0
"""Of one case; those that train, or start a whole program, say how many they need."""
LONGEST = 1000
"""Characters of a sentence."""

REFUSALS = (ValueError, OSError, SafetensorError, NotImplementedError, ModuleNotFoundError)
"""What an error that says what is wrong may be: those that the command line shows in one line."""
RAW = (JSONDecodeError, UnicodeError)
"""Not these: they are ValueErrors, but tell nobody which file was meant."""
MISMATCH = "You set `ignore_mismatched_sizes` to `False`"
"""What transformers says, without a name, of tensors that have other shapes than the model."""
OURS = Path(hf_approx.__file__).parent


class WrongError(Exception):
    """Raised by a case: something loaded as something else, was leaked, or was said in no clear sentence."""


class LostError(Exception):
    """Raised by a case: a good state that was there before is not there any more."""


class RefusedError(ValueError):
    """Raised by a case: the command line refused in one line."""


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        name: Names it, for `--case`.
        kind: Row of the table it counts in.
        run: Gets an empty folder; returns what was done if all is fine, and raises otherwise.
        what: What was done, for a case that raises.
        seconds: Time limit.
    """

    name: str
    kind: str
    run: Callable[[Path], Any]
    what: Callable[[], str] | str = ""
    seconds: float = SECONDS


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    case: str
    kind: str
    outcome: str
    note: str = ""


def scratch() -> Path:
    """Where folders of cases are made: in memory if the machine has such a place."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="torture-", dir=memory if memory.is_dir() else None))


def problem(error: BaseException) -> str | None:
    """Why an error is no refusal in one clear sentence; None if it is."""
    name, text = type(error).__name__, str(error).strip()
    if not isinstance(error, REFUSALS) or isinstance(error, RAW):
        return f"{name}: {text}"
    if not text or len(text.splitlines()) > 1 or len(text) > LONGEST or " " not in text:
        return f"{name}, not one sentence: {text!r}"
    return None


def theirs(error: BaseException) -> bool:
    """Whether transformers stopped before it asked hf_approx: what it says then is not ours to say better."""
    frames = traceback.extract_tb(error.__traceback__)
    return not any(Path(frame.filename).is_relative_to(OURS) for frame in frames) and MISMATCH not in str(error)


def judge(case: Case, folder: Path, trace: bool = False) -> Result:
    """Run a case in this process."""

    def result(outcome: str, note: str) -> Result:
        what = case.what() if callable(case.what) else case.what
        return Result(case.name, case.kind, outcome, f"{what}: {note}" if what else note)

    try:
        case.run(folder)
    except LostError as error:
        return result("lost", str(error))
    except WrongError as error:
        return result("wrong", str(error))
    except BaseException as error:
        if trace:
            traceback.print_exc()
        found = problem(error)
        return result("refused", str(error)) if found is None else result("wrong", found)
    return result("fine", "")


def run(cases: Sequence[Case], workers: int, chunk: int = 50) -> list[Result]:
    """Judge all cases, `chunk` of them in each fork; those that must not be are printed as they are found."""
    root = scratch()
    todo = deque(range(i, min(i + chunk, len(cases))) for i in range(0, len(cases), chunk))
    running: list[_Worker] = []
    results: list[Result] = []
    shown = time.monotonic()
    try:
        while todo or running:
            while todo and len(running) < workers:
                running.append(_Worker(cases, todo.popleft(), root))
            ready = select.select([worker.pipe for worker in running], [], [], 0.2)[0]
            for worker in list(running):
                if worker.pipe in ready:
                    worker.read()
                if not worker.done and not worker.overdue():
                    continue
                running.remove(worker)
                left = worker.stop()
                results += worker.results
                for result in bad(worker.results):
                    print(f"{result.outcome}: {result.case}: {' '.join(result.note.split())}", flush=True)
                if left:
                    todo.appendleft(left)
            if time.monotonic() - shown > 30:
                shown = time.monotonic()
                found = len(results) + sum(len(worker.results) for worker in running)
                print(f"  {found} of {len(cases)}", file=sys.stderr, flush=True)
    finally:
        for worker in running:
            worker.stop()
        shutil.rmtree(root, ignore_errors=True)
    order = {case.name: i for i, case in enumerate(cases)}
    return sorted(results, key=lambda result: order[result.case])


class _Worker:
    """A fork that judges a range of cases, and says when it starts and ends each."""

    def __init__(self, cases: Sequence[Case], span: range, root: Path) -> None:
        self.cases, self.left = cases, span
        self.results: list[Result] = []
        self.done = False
        self._buffer = b""
        self._started = time.monotonic()
        self.pipe, end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.pipe)
            _leave(lambda: self._work(end, root))
        os.close(end)

    def _work(self, end: int, root: Path) -> None:
        os.setsid()  # so that what a case started ends with its worker
        silence()
        limit_memory()
        for i in self.left:
            with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as folder:
                result = judge(self.cases[i], Path(folder))
                os.write(end, json.dumps([result.case, result.kind, result.outcome, result.note]).encode() + b"\n")

    def read(self) -> None:
        """What it said; if it is at its end, or died, `done` is set."""
        data = os.read(self.pipe, 1 << 16)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self.results.append(Result(*json.loads(line)))
            self.left, self._started = self.left[1:], time.monotonic()
        self.done = self.done or not data

    def overdue(self) -> bool:
        """Whether the case it is at takes too long."""
        return bool(self.left) and time.monotonic() - self._started > self.cases[self.left[0]].seconds

    def stop(self) -> range:
        """End it; the case it was at is wrong. Returns those it has not come to, to be judged by another."""
        late = self.overdue()
        for pid in (-self.pid, self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.pipe)
        if self.left:
            case = self.cases[self.left[0]]
            end = os.waitstatus_to_exitcode(status)
            how = f"hung for {case.seconds:.0f} s" if late else f"ended its process ({end})"
            what = case.what() if callable(case.what) else case.what
            self.results.append(Result(case.name, case.kind, "wrong", f"{what}: {how}"))
        return self.left[1:]


def _leave(action: Callable[[], None]) -> None:
    """Run in a fork, and end it without running anything of the process it is a fork of."""
    code = 1
    try:
        action()
        code = 0
    finally:
        os._exit(code)


def silence() -> None:
    """Nothing a case prints is shown, and nothing can be asked."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)


def limit_memory() -> None:
    """Let this process take `MEMORY` more than it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


@dataclass(frozen=True)
class Ended:
    """How a fork ended: killed by us, or with what it returned or raised."""

    killed: bool
    error: BaseException | None = None
    value: Any = None


def in_child(action: Callable[[], Any], kill_after: float | None = None) -> Ended:
    """Run in a fork of this process; what it returns is JSON.

    Args:
        action: May end itself by SIGKILL.
        kill_after: Seconds after which it gets SIGKILL.

    Raises:
        WrongError: It died in another way.
    """
    pipe, end = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(pipe)
        _leave(lambda: _report(action, end))
    os.close(end)
    killed, chunks = False, []
    while True:
        wait = None if kill_after is None or killed else max(0.0, started + kill_after - time.monotonic())
        if not select.select([pipe], [], [], wait)[0]:
            os.kill(pid, signal.SIGKILL)
            killed = True
            continue
        data = os.read(pipe, 1 << 16)
        if not data:
            break
        chunks.append(data)
    os.close(pipe)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answer = b"".join(chunks)
    if answer.endswith(b"\n"):
        kind, value = json.loads(answer)
        errors = {"refused": RefusedError, "wrong": WrongError, "lost": LostError}
        return Ended(False, value=value) if kind == "value" else Ended(False, error=errors[kind](value))
    if status == -signal.SIGKILL:
        return Ended(True)
    raise WrongError(f"the process ended with {status}")


def _report(action: Callable[[], Any], end: int) -> None:
    try:
        answer = ["value", action()]
    except LostError as error:
        answer = ["lost", str(error)]
    except WrongError as error:
        answer = ["wrong", str(error)]
    except BaseException as error:
        found = problem(error)
        answer = ["refused", str(error)] if found is None else ["wrong", found]
    os.write(end, json.dumps(answer).encode() + b"\n")


def table(results: Sequence[Result]) -> str:
    """A row for each kind and one for all."""
    kinds = list(dict.fromkeys(result.kind for result in results))
    rows = [["", "tried", *OUTCOMES]]
    for kind in [*kinds, "all"]:
        own = [result.outcome for result in results if kind in ("all", result.kind)]
        rows.append([kind, str(len(own)), *(str(own.count(outcome)) for outcome in OUTCOMES)])
    wide = max(len(row[0]) for row in rows)
    return "\n".join(f"{row[0]:<{wide}}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows)


def bad(results: Sequence[Result]) -> Iterator[Result]:
    """Those that must not be."""
    return (result for result in results if result.outcome in ("lost", "wrong"))
