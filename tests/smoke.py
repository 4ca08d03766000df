"""Runs recipes at smoke size, two at a time, in processes that share their imports.

Usage: smoke.py OUTPUT RECIPE:CONFIG [RECIPE:CONFIG ...]
"""

import os
import sys
from pathlib import Path

from fresh import ALL, Forks, job

RECIPES = Path(__file__).parent.parent / "recipes"


def main(output, runs):
    # What `accelerate launch --config_file recipes/accelerate/cpu.yaml` tells the one process that it starts.
    env = {**os.environ, "ACCELERATE_USE_CPU": "True", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}
    forks, jobs = Forks(ALL), []
    for recipe, config in (run.split(":") for run in runs):
        options = ["--config", RECIPES / "configs" / f"{config}.yaml", "--output_dir", f"{output}/{recipe}", "--smoke"]
        jobs.append(job(RECIPES / f"{recipe}.py", *options, env=env))
    failed = 0
    for ended in forks.run(jobs, timeout=1200, at_once=2):
        print(f"{Path(ended.args[0]).name} ended with {ended.returncode}:\n{ended.stdout}", flush=True)
        if ended.returncode:
            failed = 1
            print(ended.stderr, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
