"""Files that appear whole, whatever happens while they are written."""

import os
import stat
import threading

import pytest

from hf_approx.files import replacing, write_bytes, write_text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.txt"


def names(path):
    return sorted(other.name for other in path.parent.iterdir())


def test_a_file_is_written_and_written_over(path):
    write_text(path, "one\ntwo \u2028 é\r\n")
    assert path.read_bytes() == "one\ntwo \u2028 é\r\n".encode()
    write_bytes(str(path), b"three")
    assert path.read_bytes() == b"three"
    assert names(path) == ["file.txt"]


def test_a_new_file_has_the_mode_of_new_files_and_an_old_one_keeps_its_own(path):
    before = os.umask(0o027)
    try:
        write_text(path, "one")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_text(path, "two")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_leaves_the_old_file(path, error):
    write_text(path, "old")

    def fail():
        with replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert names(path) == ["file.txt"]
    assert path.read_text() == "old"
    # A full disk does not say of which file it was.
    assert not isinstance(error, OSError) or str(path) in str(caught.value)


def test_a_link_is_replaced_and_not_written_through(path, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "mine"
    target.write_text("mine")
    for link in (target, elsewhere / "nothing", path):  # the last one leads to itself
        path.unlink(missing_ok=True)
        path.symlink_to(link)
        write_text(path, "new")
        assert not path.is_symlink()
        assert path.read_text() == "new"
    assert target.read_text() == "mine"
    assert names(target) == ["mine"]


def test_what_is_no_file_is_refused(path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to(os.devnull)
    path.mkdir()
    before = names(path)
    for name in ("pipe", "device", "file.txt", "nowhere/file"):
        with pytest.raises(OSError, match=name.split("/")[0]):
            write_text(tmp_path / name, "new")
    assert names(path) == before


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(path, tmp_path):
    others = [".file.txt-0123abcd.partial.txt", ".file.txt-notes.partial", ".file-0123abcd.partial", "x.partial"]
    for name in (*others, ".file.txt-0123abcd.partial"):
        (tmp_path / name).write_text("left")
    os.mkfifo(tmp_path / ".file.txt-00000000.partial")
    with replacing(path) as file:
        file.write(b"outer")
        thread = threading.Thread(target=write_text, args=(path, "inner"))
        thread.start()
        thread.join()
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert names(path) == sorted([*others, ".file.txt-00000000.partial", "file.txt"])


def test_long_names(tmp_path):
    for name in ("é" * 100 + ".json", "a" * 255):
        write_text(tmp_path / name, "new")
        assert (tmp_path / name).read_text() == "new"
