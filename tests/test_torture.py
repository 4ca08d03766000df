"""A short part of what `make torture` does, and that it would find something."""

from helpers import python

# In a process of its own, because workers are forks of it: no thread, no lock of a test runner may be in them.
PLANTED = """
import os, sys, time

import torch
from torture.__main__ import main, quiet
from torture.actions import Action
from torture.engine import Case, LostError, WrongError, run, scratch
from torture import disk, folders, kill

def lost(folder): raise LostError("gone")
def wrong(folder): raise WrongError("another")
def refused(folder): raise ValueError("There is no such thing.")
def lines(folder): raise ValueError("There is\\nno such thing.")
def another(folder): raise KeyError("x")
def hung(folder): time.sleep(60)
def dead(folder): os._exit(0)
def greedy(folder): bytearray(10 << 30)
def fine(folder): (folder / "x").write_text("x")

expected = {
    lost: "lost", wrong: "wrong", refused: "refused", lines: "wrong", another: "wrong", hung: "wrong", dead: "wrong",
    greedy: "wrong", fine: "fine",
}
quiet()
results = run([Case(f.__name__, "planted", f, "", 1.0) for f in expected], 2, chunk=4)
assert [result.outcome for result in results] == list(expected.values()), results

for codec in folders.CODECS:
    variant = next(iter(folders.CODECS[codec]))
    truth = folders.good(codec, variant).truth
    torch.manual_seed(0)
    model = folders.CODECS[codec][variant]()
    truth["grids"] = folders.grids_of(model)
    assert folders.difference(truth, model) is None, codec
    name = list(truth["tensors"])[-1]
    model.state_dict()[name].reshape(-1)[-1:].view(torch.uint8)[0] ^= 1
    assert folders.difference(truth, model) == f"/tensors/{name} differs"

def careless(folder):
    (folder / "model").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (folder / "model" / name).write_text(name * 100_000)

def old(folder):
    folders.write({"model/a": b"old", "model/b": b"old"}, folder)

action = Action("save carelessly", old, careless)
root = scratch()
kill.measure(action, root)
for cases in (kill.cases([action], 20, 0), disk.cases([action], 4)):
    assert {"lost"} < {result.outcome for result in run(cases, 2)}, cases
os.rmdir(root)
"""
SHORT = """
sys.exit(main("--short --cases 20 --kills 12 --disks 5 --hostile 100".split()))
"""


def test_it_finds_what_is_planted_and_nothing_else():
    result = python(PLANTED + SHORT, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-3000:]}"
    total = next(line for line in result.stdout.splitlines() if line.startswith("all "))
    tried, fine, refused, lost, wrong = map(int, total.split()[1:])
    assert tried == fine + refused > 200
    assert fine > 50
    assert refused > 100
    assert lost == wrong == 0
