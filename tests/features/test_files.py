"""Features on disk: never another medium's, another encoder's or a damaged file's, whoever else writes or dies."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from longrl.features import files as feature_files
from longrl.features.files import FeatureFiles
from tests.distributed import forked_processes
from tests.runs import ROOT

LARGE = 1 << 40
SPAWN = forked_processes()


def tensor(seed=0, rows=7, dtype=torch.float32):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_in(folder, provenance="p", max_bytes=LARGE):
    return FeatureFiles(folder, provenance, max_bytes)


def files_in(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


# ---- one file ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_bit_for_bit(tmp_path, dtype):
    wanted = tensor(dtype=dtype)
    size = cache_in(tmp_path).write("k", wanted, 1.25)
    features, encode_s = cache_in(tmp_path).read("k")
    assert torch.equal(features, wanted)
    assert features.dtype == dtype
    assert encode_s == 1.25
    assert cache_in(tmp_path).num_bytes() == size


def test_a_file_says_what_it_holds(tmp_path):
    cache = cache_in(tmp_path)
    cache.write("k", tensor(), 0.5)
    with safe_open(cache.path("k"), "pt") as file:
        found = file.metadata()
    assert len(found.pop("sha256")) == 64
    assert found == {
        "key": "k", "provenance": "p", "shape": "[7, 5]", "dtype": "torch.float32", "encode_s": "0.500000"
    }  # fmt: skip


def test_another_key_or_provenance_is_absent(tmp_path):
    cache_in(tmp_path).write("k", tensor(), 0.0)
    assert cache_in(tmp_path).read("other") is None
    assert cache_in(tmp_path, "q").read("k") is None


@pytest.mark.parametrize(("key", "provenance", "told"), [("other", "p", "key"), ("k", "q", "provenance")])
def test_a_file_in_anothers_place_is_not_taken_for_it(tmp_path, caplog, key, provenance, told):
    cache, other = cache_in(tmp_path), cache_in(tmp_path, provenance)
    cache.write("k", tensor(), 0.0)
    os.rename(cache.path("k"), other.path(key))
    assert other.has(key)
    assert other.read(key) is None
    assert other.num_broken == 1
    assert f"its {told} is" in caplog.text


def test_no_bit_of_a_file_can_flip_unnoticed(tmp_path, caplog):
    """At 400 random places: the file is refused, or (in what only pads the header) the features are right."""
    cache, wanted, draw = cache_in(tmp_path), tensor(), random.Random(0)
    cache.write("k", wanted, 1.0)
    whole, caught = cache.path("k").read_bytes(), 0
    for _ in range(400):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        cache.path("k").write_bytes(data)
        found = cache.read("k")
        caught += found is None
        assert found is None or (torch.equal(found[0], wanted) and found[1] == 1.0)
    assert cache.num_broken == caught >= 395
    cache.path("k").write_bytes(whole)
    assert torch.equal(cache.read("k")[0], wanted)


def test_a_truncated_or_lengthened_file_is_encoded_again(tmp_path):
    cache = cache_in(tmp_path)
    cache.write("k", tensor(), 1.0)
    whole = cache.path("k").read_bytes()
    for data in (*(whole[:size] for size in range(0, len(whole), 7)), whole + b"x"):
        cache.path("k").write_bytes(data)
        assert cache.read("k") is None


# ---- the limit ----


def test_the_least_recently_used_are_evicted_in_order(tmp_path):
    cache = cache_in(tmp_path)
    size = cache.write("a", tensor(), 0.0)
    cache.write("b", tensor(), 0.0)
    cache.write("c", tensor(), 0.0)
    for age, key in enumerate("cba"):
        os.utime(cache.path(key), (1000 - age, 1000 - age))
    small = cache_in(tmp_path, max_bytes=3 * size + 10)
    assert small.read("a") is not None  # now b is the oldest
    small.write("d", tensor(), 0.0)
    assert [small.has(key) for key in "abcd"] == [True, False, True, True]
    small.write("e", tensor(), 0.0)
    assert [small.has(key) for key in "abcde"] == [True, False, False, True, True]
    assert small.num_evicted == 2
    assert small.num_bytes() <= small.max_bytes


def test_what_is_larger_than_the_limit_is_not_written(tmp_path, caplog):
    cache = cache_in(tmp_path, max_bytes=100)
    assert cache.write("a", tensor(), 0.0) == cache.write("b", tensor(), 0.0) == 0
    assert files_in(tmp_path) == []
    assert caplog.text.count("model.feature_cache_disk_bytes=100; raise it") == 1


# ---- many processes ----


def write_and_read(folder, worker, max_bytes, results):
    """40 rounds on 6 keys that all share and 2 of its own."""
    cache, draw, wrong = cache_in(folder, max_bytes=max_bytes), random.Random(worker), 0
    for turn in range(40):
        number = draw.choice([0, 1, 2, 3, 4, 5, 10 + worker, 20 + worker])
        found = cache.read(f"k{number}")
        if found is None:
            cache.write(f"k{number}", tensor(number, rows=2000), float(turn))
        else:
            wrong += not torch.equal(found[0], tensor(number, rows=2000))
    results.put((wrong, cache.num_broken, cache._paused_until))


@pytest.mark.slow
@pytest.mark.parametrize("max_bytes", [LARGE, 250_000])
def test_eight_writers_at_once_leave_whole_files(tmp_path, max_bytes):
    """250 kB hold six of the 22 files: all evict, each other's too."""
    results = SPAWN.Queue()
    workers = [SPAWN.Process(target=write_and_read, args=(tmp_path, n, max_bytes, results)) for n in range(8)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=600) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert found == [(0, 0, 0.0)] * 8
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    cache = cache_in(tmp_path)
    numbers = [*range(6), *range(10, 18), *range(20, 28)]
    stored = {number: cache.read(f"k{number}") for number in numbers}
    assert all(torch.equal(s[0], tensor(n, rows=2000)) for n, s in stored.items() if s)
    assert cache.num_broken == 0


KILLED = """
import os, sys
from pathlib import Path
import torch
from longrl.features.files import FeatureFiles
cache = FeatureFiles(sys.argv[1], "p", 1 << 40)
real = os.fsync
def stall(fd):
    os.ftruncate(fd, os.fstat(fd).st_size // 2)
    print("writing", flush=True)
    sys.stdin.read()
os.fsync = stall
cache.write("k", torch.ones(1000, 5), 0.0)
"""


def test_kill_9_in_mid_write_leaves_what_was_there_and_its_rest_is_cleaned_up(tmp_path, monkeypatch):
    cache_in(tmp_path).write("k", tensor(), 1.0)
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    (rest,) = tmp_path.glob(".*.tmp")
    assert torch.equal(cache_in(tmp_path).read("k")[0], tensor())

    live = tmp_path / ".live.tmp"
    live.write_bytes(b"x")
    cache_in(tmp_path).write("a", tensor(), 0.0)
    assert rest.exists()  # it may still be written to
    os.utime(rest, (1, time.time() - feature_files.STALE_AFTER_S - 1))
    cache_in(tmp_path).write("b", tensor(), 0.0)
    assert not rest.exists()
    assert live.exists()


# ---- folders that cannot be written to ----


def test_a_full_disk_is_told_once_and_tried_again_later(tmp_path, caplog, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cache_in(tmp_path)
    cache.write("old", tensor(), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cache.write("a", tensor(), 0.0) == cache.write("b", tensor(), 0.0) == 0
    assert caplog.text.count("cannot be written to model.feature_cache_dir=") == 1
    assert "No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [cache.path("old").name]
    assert cache.read("old") is not None
    assert cache.write("a", tensor(), 0.0) == 0  # it waits
    monkeypatch.setattr(feature_files, "RETRY_AFTER_S", 0.0)
    cache._paused_until = 0.0
    assert cache.write("a", tensor(), 0.0) > 0


def test_a_folder_to_read_only_is_read(tmp_path, caplog, monkeypatch):
    """Permissions do not bind root, so the refusals are played."""

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    cache_in(tmp_path).write("k", tensor(), 0.0)
    monkeypatch.setattr(feature_files, "atomic_write", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    cache = cache_in(tmp_path)
    assert cache.read("k") is not None
    assert cache.write("a", tensor(), 0.0) == 0
    assert "(Read-only file system)" in caplog.text
    assert "name a folder that can be written to" in caplog.text


def test_a_file_for_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"model\.feature_cache_dir must be a folder .* got '.*file'.*name another"):
        cache_in(tmp_path / "file")
