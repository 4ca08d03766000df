"""States of long runs, cards and other files, whenever the process that writes them dies."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch

from hf_approx.cards import MARKER, write_card
from hf_approx.files import replacing
from hf_approx.loops.states import MARK, begin_state, end_state, saved_states
from models import build

CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def forked(task):
    """Run a task in a process that is a copy of this one; its identity."""
    process = os.fork()
    if process == 0:
        try:
            task()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return process


def code_of(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dying_at(call, task):
    """Run a task in a process that dies at this file-system call; 9 if it did, 0 if it had ended before."""
    left = [call]

    def count(event, args):
        # Not the imports that a first call may need.
        if event in CALLS and not str(args[0]).endswith((".py", ".pyc", "__pycache__")):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    def run():
        sys.addaudithook(count)
        task()

    return code_of(forked(run))


def save(folder, number):
    state = folder / f"round-{number}"
    begin_state(state)
    with replacing(state / "state.pt") as file:
        torch.save({"number": number, "weights": torch.full((50,), number)}, file)
    (state / "other").write_text(str(number))
    end_state(state, "a search")


def newest(folder):
    """The number of the newest state, which is whole."""
    states = saved_states(folder, "round")
    if not states:
        return 0
    assert (states[-1] / MARK).read_text() == "a search"
    state = torch.load(states[-1] / "state.pt", weights_only=True)
    assert torch.equal(state["weights"], torch.full((50,), state["number"]))
    assert (states[-1] / "other").read_text() == str(state["number"])
    return state["number"]


def test_the_newest_state_is_whole_wherever_its_process_dies(tmp_path):
    call, codes = 0, []
    while codes[-1:] != [0]:
        folder = tmp_path / str(call)
        save(folder, 9)  # ten sorts after nine
        call += 1
        codes.append(dying_at(call, lambda folder=folder: save(folder, 10)))
        assert newest(folder) in ((10,) if codes[-1] == 0 else (9, 10))
        save(folder, 11)
        assert newest(folder) == 11
        assert os.listdir(folder) == ["round-11"]
        assert sorted(os.listdir(folder / "round-11")) == [MARK, "other", "state.pt"]
        shutil.rmtree(folder)
    assert codes[:-1] == [9] * (call - 1)
    assert call > 8


def test_the_newest_state_is_whole_whenever_its_process_is_killed(tmp_path):
    wait, reached = random.Random(0), 0
    for _ in range(20):
        receiver, sender = os.pipe()

        def run(start=reached, sender=sender):
            for number in range(start + 1, start + 100):
                save(tmp_path, number)
                os.write(sender, b".")

        process = forked(run)
        os.close(sender)
        os.read(receiver, 1)  # it has written one
        time.sleep(wait.uniform(0, 0.01))
        os.kill(process, signal.SIGKILL)
        code_of(process)
        os.close(receiver)
        assert newest(tmp_path) > reached
        reached = newest(tmp_path)


def test_marks_of_earlier_versions_and_other_folders(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "round-2").mkdir()
    (tmp_path / "round-2" / MARK).touch()  # killed while it was written
    for name in ("round-x", "round-", "rounds", "step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK).write_text("else")
    assert newest(tmp_path) == 1
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["round-", "round-3", "round-x", "rounds", "step-3"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "model"
    build("bert").save_pretrained(folder)
    return folder


def test_a_card_is_old_or_new_and_can_be_written_again(model):
    card = model / "README.md"
    call, code = 0, 9
    while code == 9:
        card.unlink(missing_ok=True)
        if call % 2:
            write_card(model)
            old = card.read_bytes()
        call += 1
        code = dying_at(call, lambda: write_card(model))
        assert MARKER in card.read_text() if card.exists() else call % 2
    assert code == 0
    assert call > 5
    assert old == card.read_bytes()
    assert write_card(model)
    assert [name for name in os.listdir(model) if name.startswith(".")] == []


def test_a_full_disk_leaves_the_old_card(model):
    write_card(model)
    report = model / "approx_report.json"
    report.write_text(json.dumps({"about": {"note": "x" * 5000}}))
    old = (model / "README.md").read_bytes()

    def write():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        try:
            write_card(model)
        except OSError as error:
            os._exit(7 if "README.md" in str(error) else 8)

    assert code_of(forked(write)) == 7
    assert (model / "README.md").read_bytes() == old
    assert sorted(os.listdir(model)) == ["README.md", "approx_report.json", "config.json", "model.safetensors"]
    report.unlink()
    (model / "README.md").write_bytes(b"")  # what a full disk left before files were replaced
    assert write_card(model)
