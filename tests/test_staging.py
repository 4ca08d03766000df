"""Folders that are replaced whole: killed at every call, on full disks, beside what else is in them."""

import errno
import os
import resource
import shutil

import pytest

from hf_approx import staging
from hf_approx.layout import MARKER, stale_files
from hf_approx.staging import recover, staged
from kills import kill_while, killed_at_every_call, limited

KEPT = {"tokenizer.json": "mine", ".gitattributes": "mine", "notes.txt": "mine"}


def fill(folder, text):
    """A model of one text: weights in shards, config, card, report."""
    names = ["model.safetensors", "config.json", "README.md", "approx_report.json", "layers.png"]
    if text == "old":
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", *names[1:]]
        names.append("model.safetensors.index.json")
    for name in names:
        (folder / name).write_text(f"{MARKER} {text}")


def old_folder(folder):
    folder.mkdir()
    fill(folder, "old")
    for name, text in KEPT.items():
        (folder / name).write_text(text)
    (folder / "link").symlink_to("notes.txt")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "state").write_text("mine")
    return folder


def save(folder, text="new"):
    with staged(folder) as partial:
        fill(partial, text)


def content(folder):
    """Texts by name; of files of the model only who wrote them."""
    found = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    return {name: text.removeprefix(f"{MARKER} ") for name, text in found.items()}


def expected(text):
    folder = {}
    names = ["config.json", "README.md", "approx_report.json", "layers.png"]
    weights = ["model.safetensors"]
    if text == "old":
        weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        names.append("model.safetensors.index.json")
    folder.update(dict.fromkeys([*names, *weights], text))
    return {**folder, **KEPT, "link": "mine", "checkpoint-5/state": "mine"}


def hidden(folder):
    return [p.name for p in folder.iterdir() if "-saving-" in p.name]


def no_exchange(monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda folder, target: False)


def test_a_new_folder_appears_whole(tmp_path):
    with staged(tmp_path / "a" / "b") as partial:
        fill(partial, "new")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "config.json").is_file()
    assert os.listdir(tmp_path / "a") == ["b"]
    reference = tmp_path / "reference"
    reference.mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == reference.stat().st_mode


@pytest.mark.parametrize("exchange", [True, False])
def test_what_is_not_the_old_models_comes_along(tmp_path, monkeypatch, exchange):
    if not exchange:
        no_exchange(monkeypatch)
    target = old_folder(tmp_path / "model")
    target.chmod(0o2751)
    inode = (target / "notes.txt").stat().st_ino
    save(target)
    assert content(target) == expected("new")
    assert target.stat().st_mode & 0o7777 == 0o2751
    assert (target / "notes.txt").stat().st_ino == inode
    assert (target / "link").is_symlink()
    assert os.listdir(tmp_path) == ["model"]


def test_files_are_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EMLINK, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    target = old_folder(tmp_path / "model")
    save(target)
    assert content(target) == expected("new")


def test_a_card_written_by_hand_stays(tmp_path):
    target = old_folder(tmp_path / "model")
    (target / "README.md").write_text("by hand")
    with staged(target) as partial:
        (partial / "config.json").write_text("new")
    assert (target / "README.md").read_text() == "by hand"
    assert not (target / "approx_report.json").exists()


def test_weights_of_another_variant_stay_while_the_config_does(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, names in (
        (old, ["model.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]),
        (new, ["model.fp16.safetensors"]),
    ):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        (folder / "config.json").write_text("same")
    mine = {"model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"}
    always = {"approx_report.json", "layers.png", "training.png", "similarity.png"}
    assert stale_files(old, new) == mine | always
    (new / "config.json").write_text("other")
    assert stale_files(old, new) == {*mine, "model.safetensors"} | always
    (new / "model.fp16.safetensors").rename(new / "adapter_model.safetensors")
    assert stale_files(old, new) == always


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error):
    target = old_folder(tmp_path / "model")
    with pytest.raises(type(error)), staged(target) as partial:  # noqa: PT012 - it is about the block
        fill(partial, "new")
        raise error
    assert content(target) == expected("old")
    assert os.listdir(tmp_path) == ["model"]


def test_links_are_followed_to_their_folder(tmp_path):
    old_folder(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "ahead").symlink_to("later")
    save(tmp_path / "link")
    save(tmp_path / "ahead")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "ahead").is_symlink()
    assert content(tmp_path / "model") == expected("new")
    assert (tmp_path / "later" / "config.json").is_file()


def test_a_block_within_a_block_writes_to_the_same_folder(tmp_path):
    with staged(tmp_path / "model") as outer, staged(outer) as inner:
        assert inner == outer
        fill(inner, "new")
    assert (tmp_path / "model" / "config.json").is_file()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError), staged(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "a file"


def test_the_folder_this_process_is_in_is_filled(tmp_path, monkeypatch):
    target = old_folder(tmp_path / "model")
    (target / "inside").mkdir()
    for here in (target, target / "inside"):
        monkeypatch.chdir(here)
        inode = target.stat().st_ino
        save(target if here != target else ".", f"new {here.name}")
        assert target.stat().st_ino == inode
        found = content(target)
        assert found["config.json"] == f"new {here.name}"
        assert not any("00001" in name for name in found)
        assert {name: found[name] for name in KEPT} == KEPT
        assert hidden(target) == []
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_that_cannot_be_renamed_is_filled(tmp_path, monkeypatch):
    target = old_folder(tmp_path / "model")

    def busy(folder, target):
        raise OSError(errno.EBUSY, "a disk is mounted here")

    monkeypatch.setattr(staging, "_exchange", busy)
    save(target)
    assert content(target) == expected("new")
    assert os.listdir(tmp_path) == ["model"]


def test_the_folder_of_a_process_that_lives_is_left_alone(tmp_path):
    target = old_folder(tmp_path / "model")
    outer = staged(target)
    partial = outer.__enter__()
    save(target, "new")  # its own descriptors are others': as another process
    assert partial.is_dir()
    fill(partial, "newest")
    outer.__exit__(None, None, None)
    assert content(target) == expected("newest")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("way", ["exchange", "two renames", "new"])
def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, way):
    """And what it leaves beside it, checkpoints in it above all, the next save puts in order."""
    if way == "two renames":
        no_exchange(monkeypatch)
    gone = 0

    def prepare():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if way != "new":
            old_folder(tmp_path / "model")

    for call, last in killed_at_every_call(prepare, lambda: save(tmp_path / "model")):
        target = tmp_path / "model"
        found = content(target) if target.exists() else None
        if found is None:
            assert way != "exchange", call
            gone += 1
        else:
            assert {found["config.json"], found["README.md"]} in ({"old"}, {"new"}), call
            wanted = expected(found["config.json"])
            if way == "new":
                wanted = {name: text for name, text in wanted.items() if text == "new"}
            assert {n: t for n, t in found.items() if "checkpoint" not in n} == {
                n: t for n, t in wanted.items() if "checkpoint" not in n
            }, call
        recover(target)
        if way != "new":
            assert (target / "checkpoint-5" / "state").read_text() == "mine", call
        assert os.listdir(tmp_path) in ([], ["model"]), call
        save(target, "newest")
        assert content(target)["config.json"] == "newest"
        assert os.listdir(tmp_path) == ["model"], call
        assert not last or found is not None
    if way == "two renames":
        assert gone == 1  # between the two


def test_a_kill_while_a_fixed_folder_is_filled_leaves_no_old_config_beside_all_of_the_new(tmp_path, monkeypatch):
    """The config is the last to change."""

    def prepare():
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        monkeypatch.chdir(old_folder(tmp_path / "model"))

    for call, _ in killed_at_every_call(prepare, lambda: save(tmp_path / "model")):
        found = content(tmp_path / "model")
        found = {name: text for name, text in found.items() if "-saving-" not in name}
        if found["config.json"] == "new":
            assert found == expected("new"), call
        save(tmp_path / "model", "newest")
        assert content(tmp_path / "model") == {**expected("new"), **dict.fromkeys(MODEL, "newest")}, call


MODEL = ["model.safetensors", "config.json", "README.md", "approx_report.json", "layers.png"]


def test_files_that_may_not_grow_leave_the_old_folder(tmp_path):
    target = old_folder(tmp_path / "model")

    def write():
        with staged(target) as partial:
            fill(partial, "new")
            (partial / "big").write_bytes(bytes(100_000))

    assert limited(write, resource.RLIMIT_FSIZE, 50_000) == errno.EFBIG
    assert content(target) == expected("old")
    assert os.listdir(tmp_path) == ["model"]


def test_random_kills(tmp_path):
    """A process that saves in a loop is killed at any moment, many times."""
    target = old_folder(tmp_path / "model")
    for i in range(20):
        kill_while(lambda: [save(target, f"number {n}") for n in range(1000)], 0.002 * i)
        found = content(target)
        assert len({found[name] for name in MODEL if name in found}) == 1
        recover(target)
        found = content(target)
        if found["config.json"] != "old":
            assert found == {**expected("new"), **dict.fromkeys(MODEL, found["config.json"])}
        assert os.listdir(tmp_path) == ["model"]
