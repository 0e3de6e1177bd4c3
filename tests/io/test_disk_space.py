"""Room on the disk is looked for where it will be needed, and what is missing is said with what helps."""

import logging

import pytest

from longrl.io import disk_space
from longrl.io.disk_space import GIB, check_writable, free_bytes, tell_missing_space


def test_the_disk_is_that_of_the_nearest_folder_that_is_there(tmp_path):
    assert free_bytes(tmp_path / "not" / "yet" / "there") > 0


def test_missing_room_is_said_with_both_numbers_and_a_remedy(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(disk_space, "free_bytes", lambda folder: 3 * GIB)
    assert not tell_missing_space(tmp_path, 3 * GIB, "a checkpoint", "save less")
    assert caplog.messages == []
    assert tell_missing_space(tmp_path, 4 * GIB, "a checkpoint", "save less")
    (line,) = caplog.messages
    assert "needs 4.0 GiB for a checkpoint, but 3.0 GiB are free" in line
    assert line.endswith("or save less")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--run_dir=.*file/run cannot be written \(Not a directory\); name another"):
        check_writable(str(tmp_path / "file" / "run"))
    check_writable(str(tmp_path / "new" / "run"))
    assert list((tmp_path / "new" / "run").iterdir()) == []
