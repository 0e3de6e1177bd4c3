"""Tiny runs leave nothing behind; `bench/soak.py` takes a thousand steps."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak_watch import processes_below, usage

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module("soak")


def sample(step, rss_mib, **values):
    return {
        "step": step,
        "rss_mib": rss_mib,
        "own_rss_mib": 90,
        "fds": 9,
        "threads": 2,
        "processes": 1,
        "shm_bytes": 0,
        **values,
    }


def test_the_slope_is_that_behind_the_warm_up(soak):
    samples = [sample(step, 100 + step) for step in range(200)]
    samples += [sample(step, 300 + step / 200) for step in range(200, 1001)]
    row = soak.row_of("hf", samples)
    assert row["rss_slope_mib_per_100"] == pytest.approx(0.5, abs=1e-3)
    assert (row["steps"], row["engine"], row["fds"], row["fds_growth"]) == (1000, "hf", 9, 0)
    assert soak.is_flat(row)
    assert not soak.is_flat(row | {"rss_slope_mib_per_100": 1.2})


@pytest.mark.parametrize("field", ["fds", "threads", "processes", "shm_bytes"])
def test_one_more_of_anything_is_growth(soak, field):
    samples = [sample(step, 100, **{field: 3 + step // 600}) for step in range(1001)]
    row = soak.row_of("hf", samples)
    assert row[f"{field}_growth"] == 1
    assert not soak.is_flat(row)


def test_children_and_shared_files_are_counted():
    before = usage(os.getpid())
    code = "import sys; file = open(sys.argv[1], 'wb+'); file.write(bytes(5000)); file.flush(); sys.stdin.read()"
    path = Path("/dev/shm", f"longrl_test_{os.getpid()}")
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE)
    try:
        while usage(child.pid)["shm_bytes"] < 5000:
            assert child.poll() is None
        after = usage(os.getpid())
        assert child.pid in processes_below(os.getpid())
        assert after["processes"] == before["processes"] + 1
        assert after["shm_bytes"] >= before["shm_bytes"] + 5000
        assert after["fds"] > before["fds"]
    finally:
        child.communicate()
        path.unlink(missing_ok=True)


@pytest.mark.slow
def test_nothing_but_memory_grows_in_short_runs(soak):
    for row in soak.main(["--quick", "--engine=hf"]):
        assert row["steps"] >= 50
        grown = {name: number for name, number in row.items() if name.endswith("_growth") and number > 0}
        assert grown == {}
        assert row["rss_last_mib"] - row["rss_first_mib"] < 60  # allocators settle; a leak of a step's tensors shows
