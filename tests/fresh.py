"""Fresh processes without the seconds that imports take in each.

They are forked from a process that has imported torch, transformers and what those import, but never hf_approx: for
that they are as fresh as any. Run as a script, this is the process that they are forked from.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

BASE = ("torch._dynamo", "torch.distributed.tensor", "torch.export", "scipy.optimize", "sympy", "pandas", "pyarrow")
"""Modules that read nothing of the environment that the Hub's client does."""
ALL = (*BASE, "transformers.trainer", "transformers.modeling_utils", "accelerate", "datasets", "peft")


def job(code, *args, env=None, cwd=None):
    """What a process runs: Python code, or the script at a `Path`; by default where and with what this one runs."""
    script = isinstance(code, Path)
    return {
        "script": script,
        "code": str(code),
        "argv": [str(code) if script else "-c", *map(str, args)],
        "path": [str(code.parent) if script else "", *sys.path],
        "env": dict(os.environ if env is None else env),
        "cwd": str(cwd or os.getcwd()),
    }


class Forks:
    """Runs processes that have imported `modules` before they begin."""

    def __init__(self, modules):
        self._modules = modules
        self._parent = None

    def run(self, jobs, timeout=500, at_once=None):
        """Run jobs, all at once or so many; if one fails, or after so many seconds, the others are killed."""
        if self._parent is None:
            command = [sys.executable, __file__, *self._modules]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            atexit.register(self._parent.communicate)
        with tempfile.TemporaryDirectory() as folder:
            for i, each in enumerate(jobs):
                each |= {"out": f"{folder}/{i}.out", "err": f"{folder}/{i}.err"}
                Path(each["out"]).touch(), Path(each["err"]).touch()
            request = {"jobs": jobs, "timeout": timeout, "at_once": at_once or len(jobs)}
            self._parent.stdin.write(json.dumps(request).encode() + b"\n")
            self._parent.stdin.flush()
            codes = json.loads(self._parent.stdout.readline())
            return [
                subprocess.CompletedProcess(each["argv"], code, *(Path(each[n]).read_text() for n in ("out", "err")))
                for each, code in zip(jobs, codes, strict=True)
            ]


def serve():
    """Start what is asked for and answer how it ended; returns, in each new process, its job, and None at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        jobs, started, ended = request["jobs"], [], {}
        end = time.monotonic() + request["timeout"]
        while len(ended) < len(jobs):
            if len(started) < min(len(jobs), len(ended) + request["at_once"]):
                started.append(os.fork())
                if not started[-1]:
                    return jobs[len(started) - 1]
                continue
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                ended[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end or any(ended.values()):
                for other in started:
                    if other not in ended:
                        os.kill(other, signal.SIGKILL)
            time.sleep(0.01)
        print(json.dumps([ended[pid] for pid in started]), flush=True)
    return None


def become(job):
    """Be the process of a job."""
    for fd, name, flags in ((0, os.devnull, os.O_RDONLY), (1, job["out"], os.O_WRONLY), (2, job["err"], os.O_WRONLY)):
        os.dup2(os.open(name, flags | os.O_CREAT), fd)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv, sys.path[:] = job["argv"], job["path"]
    if job["script"]:
        runpy.run_path(job["code"], run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(job["code"], "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    if (own := serve()) is not None:
        become(own)
