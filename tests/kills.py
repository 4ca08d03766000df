"""Processes that die at a chosen call, on a disk that is full, or under a limit; forked from the warm test process."""

import builtins
import ctypes
import errno
import functools
import io
import itertools
import os
import resource
import signal
import time
import traceback

CALLS = [(os, name) for name in ("rename", "replace", "link", "symlink", "unlink", "rmdir", "mkdir", "chmod", "fsync")]
CHANGES = CALLS[:-2]
CALLS += [(os, "open"), (builtins, "open"), (io, "open"), (ctypes, "CDLL")]


def forked(function):
    """Exit code of a process that runs the function: 0, or 1 after an exception, which is printed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_every_call(prepare, function, calls=CALLS):
    """For n = 1, 2, ... prepares and runs the function in a process that dies before its n-th call of the system.

    Yields n, and whether the function came to its end, which is after the last n.
    """
    for number in itertools.count(1):
        prepare()
        code = forked(functools.partial(_run, function, number, calls))
        assert code in (0, 9), f"call {number}"
        yield number, code == 0
        if code == 0:
            return


def kill_while(function, seconds):
    """Kill a process that runs the function, so long after it began."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _run(function, number, calls):
    left = number

    def counted(original):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    for module, name in calls:
        setattr(module, name, counted(getattr(module, name)))
    function()


def limited(function, limit, value):
    """The error number that the function ended with under a resource limit; 0 if it did not fail."""

    def run():
        resource.setrlimit(limit, (value, value))
        try:
            function()
        except OSError as error:
            os._exit(100 + (error.errno or errno.EIO))

    code = forked(run)
    return code - 100 if code >= 100 else code
