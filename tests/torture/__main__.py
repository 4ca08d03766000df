"""`python -m torture`: damage, kills, full disks and hostile folders, and what came of each."""

import argparse
import os
import shutil
import sys
import threading
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TQDM_DISABLE"] = "1"
# Threads that load weights are lost in a fork, and cost more than they gain with tiny ones.
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"

import torch
import transformers
from tqdm import tqdm

from torture import disk, fuzz, hostile, kill
from torture.engine import Case, bad, judge, run, scratch, table

PARTS = ("fuzz", "kill", "disk", "hostile")
CHUNKS = {"fuzz": 200, "kill": 1, "disk": 8, "hostile": 8}
"""Cases of a part that one fork judges."""


def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if anything is lost or wrong."""
    parser = argparse.ArgumentParser(prog="torture", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--cases", type=int, default=10_000, help="damaged folders of each codec")
    parser.add_argument("--kills", type=int, default=200, help="kills in all")
    parser.add_argument("--disks", type=int, default=200, help="full disks in all")
    parser.add_argument("--hostile", type=int, help="hostile folders, each with one command; default: all")
    parser.add_argument("--short", action="store_true", help="kill, and fill disks for, only what is quickest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--case", help="try only this one, with the counts and the seed it had, and keep its folder")
    args = parser.parse_args(argv)
    parts = [args.case.partition("/")[0]] if args.case else args.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        parser.error(f"there is no part {unknown.pop()}")
    quiet()
    started = time.monotonic()
    root = scratch()
    try:
        actions = kill.prepare(root, args.short) if {"kill", "disk"} & set(parts) else []
        makers = {
            "fuzz": lambda: fuzz.cases(args.cases, args.seed),
            "kill": lambda: kill.cases(actions, args.kills, args.seed),
            "disk": lambda: disk.cases(actions, args.disks),
            "hostile": lambda: hostile.cases(args.hostile, args.seed),
        }
        if args.case:
            return _one(makers[parts[0]](), args.case)
        results = []
        for part in parts:
            cases = makers[part]()
            print(f"{part}: {len(cases)} cases", file=sys.stderr, flush=True)
            results += run(cases, args.workers, CHUNKS[part])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(table(results))
    print(f"seed {args.seed}, {args.workers} workers, {time.monotonic() - started:.0f} s")
    return int(any(bad(results)))


def quiet() -> None:
    """One thread, and no word of transformers: what it logs is not what is looked at here."""
    torch.set_num_threads(1)
    # tqdm's own lock is one for all forks: a killed one would keep it.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def _one(cases: list[Case], name: str) -> int:
    folder = scratch()
    result = judge(next(case for case in cases if case.name == name), folder, trace=True)
    print(f"{result.outcome}: {result.note}\nIts folder: {folder}")
    return int(result.outcome in ("lost", "wrong"))


if __name__ == "__main__":
    sys.exit(main())
