import os
import time
from pathlib import Path

import pytest

from longrl.io.atomic import STALE_AFTER_S, atomic_file, atomic_folder, atomic_write


@pytest.mark.parametrize(("content", "expected"), [("a\u00e9\n", b"a\xc3\xa9\n"), (b"\x00\xff", b"\x00\xff")])
def test_text_and_bytes_are_written_into_a_new_folder(tmp_path, content, expected):
    path = atomic_write(tmp_path / "new" / "file", content)
    assert path.read_bytes() == expected
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = atomic_write(tmp_path / "file", "old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_failed_write_leaves_the_old_file_and_no_remains(tmp_path):
    path = atomic_write(tmp_path / "file", "old")
    with pytest.raises(TypeError), atomic_file(path) as file:
        file.write(b"half" + object())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "file"
    with atomic_file(path) as first, atomic_file(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError("disk full")

    path = atomic_write(tmp_path / "file", "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- folders ----


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_complete(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "out") as work:
            (work / "file").write_text(text)
            assert text == "old" or content(tmp_path / "out") == {"file": "old"}
    assert content(tmp_path / "out") == {"file": "new"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_the_old_folder_is_put_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, error):
    with atomic_folder(tmp_path / "out") as work:
        (work / "file").write_text("old")
    rename = Path.rename

    def fails_for_new(self, target):
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_new)
    with pytest.raises(type(error)), atomic_folder(tmp_path / "out") as work:
        (work / "file").write_text("new")
    assert content(tmp_path / "out") == {"file": "old"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_folder_that_appears_meanwhile_is_not_replaced_where_none_may_be(tmp_path):
    def write():
        with atomic_folder(tmp_path / "out", replace=False):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("another's")

    with pytest.raises(FileExistsError, match="out has appeared"):
        write()
    assert content(tmp_path / "out") == {"file": "another's"}


# ---- what killed writers left ----


def age(path, seconds):
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (time.time() - seconds,) * 2)


def left_behind(folder, name, old=None):
    """A partial file, or of a folder with an old one inside."""
    path = folder / name
    if old is None:
        path.write_text("half")
        return path
    (path / "old").mkdir(parents=True)
    (path / "old" / "file").write_text(old)
    return path


def test_stale_partials_of_the_same_path_alone_are_removed(tmp_path):
    stale = left_behind(tmp_path, ".out.1234.tmp")
    others = left_behind(tmp_path, ".out.json.1234.tmp")
    for path in (stale, others):
        age(path, STALE_AFTER_S + 60)
    live = left_behind(tmp_path, ".out.5678.tmp")
    with atomic_file(tmp_path / "out") as file:
        file.write(b"new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", others.name, live.name}


def test_a_stale_folder_is_removed_unless_something_in_it_is_new(tmp_path):
    stale = left_behind(tmp_path, ".out.a_1.tmp", old="a")
    live = left_behind(tmp_path, ".out.b_2.tmp", old="b")
    for path in (stale, live):
        age(path, STALE_AFTER_S + 60)
    (live / "old" / "more").write_text("still writing")
    age(live / "old" / "file", STALE_AFTER_S + 60)
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", live.name}


def test_the_old_folder_of_a_writer_killed_between_two_renames_comes_back(tmp_path):
    age(left_behind(tmp_path, ".out.a_1.tmp", old="kept"), STALE_AFTER_S + 60)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out"):
        raise ZeroDivisionError
    assert content(tmp_path / "out") == {"file": "kept"}
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
