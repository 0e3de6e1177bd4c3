"""One process at a time writes to a folder, and a lock ends with its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from longrl.io.folder_lock import LOCK_FILE, FolderLock


def test_a_second_one_is_refused_and_told_who_holds_the_folder(tmp_path):
    lock = FolderLock(tmp_path / "run", "--run_dir")
    with pytest.raises(ValueError, match=rf"^--run_dir=\S*run is in use by process {os.getpid()} on \S+ since 20"):
        FolderLock(tmp_path / "run", "--run_dir")
    lock.release()
    lock.release()
    assert (tmp_path / "run" / LOCK_FILE).read_text() == ""
    FolderLock(tmp_path / "run", "--run_dir").release()


def test_it_ends_with_a_process_that_is_killed_though_a_forked_worker_lives_on(tmp_path):
    """The worker has the file open too."""
    script = (
        "import os, sys, time; from longrl.io.folder_lock import FolderLock; lock = FolderLock(sys.argv[1], 'x')\n"
        "worker = os.fork()\n"
        "if not worker: print(os.getpid(), flush=True)\n"  # it has left the lock to its parent by then
        "time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        with pytest.raises(ValueError, match="is in use by process"):
            FolderLock(tmp_path, "x")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        os.kill(worker, 0)
        FolderLock(tmp_path, "x").release()
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.kill()
        holder.stdout.close()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    FolderLock(tmp_path, "--run_dir").release()
    assert "cannot be locked" in caplog.text


def test_a_lock_without_words_is_held_by_another_process(tmp_path):
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use by another process"):
            FolderLock(tmp_path, "--run_dir")
