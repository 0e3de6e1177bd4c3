import os

import pytest

from longrl.io.atomic import atomic_file, atomic_write


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
