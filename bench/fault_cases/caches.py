"""Features on disk that other processes write, and that somebody altered."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import torch

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Config, Ended, fit

from tests.runs import config  # isort: skip  (its folder is on the path since the line before)

LAST = "checkpoints/last.ckpt"


def video_run(folder: Path, cache: Path | None) -> Config:
    """SFT on videos, 4 steps; with features on disk if there is a folder for them."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config("sft")
    values["trainer"]["max_steps"] = 4
    if cache is not None:
        values["model"]["feature_cache_dir"] = str(cache)
    return values


def weights_equal(*folders: Path) -> bool:
    """True if the runs in these folders ended with the same weights, to the last bit."""
    first, *others = (torch.load(folder / "run" / LAST, weights_only=True)["state_dict"] for folder in folders)
    return all(torch.equal(value, other[name]) for other in others for name, value in first.items())


def column(folder: Path, name: str) -> list[float]:
    """The values of a metric of the run in `folder / "run"`."""
    (file,) = (folder / "run").glob("logs/version_*/metrics.csv")
    with file.open(newline="") as lines:
        return [float(row[name]) for row in csv.DictReader(lines) if row[name]]


def two_runs(folder: Path) -> Outcome:
    """Both start with an empty cache, the second one as soon as the first one has begun."""
    cache = folder / "features"
    second: list[Ended] = []

    def start_second(process: int) -> bool:
        if not any(cache.glob("*")):
            return False
        second.append(fit(folder / "two", video_run(folder / "two", cache)))
        return True

    first = fit(folder / "one", video_run(folder / "one", cache), meanwhile=start_second)
    fit(folder / "plain", video_run(folder / "plain", None))
    equal = weights_equal(*(folder / name for name in ("one", "two", "plain")))
    left = [path.name for path in cache.rglob("*.tmp")]
    seen = f"both ended with {first.exit_code} and {second[0].exit_code}; weights equal: {equal}; left behind: {left}"
    return Outcome(seen, first.exit_code, "all features")


def altered_files(folder: Path) -> Outcome:
    """One bit of every file of the cache is another one; a second run reads it."""
    cache = folder / "features"
    fit(folder / "one", video_run(folder / "one", cache))
    files = [path for path in sorted(cache.rglob("*.safetensors")) if path.is_file()]
    for path in files:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        os.utime(path)
    ended = fit(folder / "two", video_run(folder / "two", cache))
    broken = sum(column(folder / "two", "throughput/features_broken"))
    equal = weights_equal(folder / "one", folder / "two")
    seen = f"{len(files)} files altered, {broken:.0f} found broken; weights equal: {equal}"
    return Outcome(seen, ended.exit_code, "the run; features are encoded anew")


FAULTS = [
    Fault(
        kind="caches",
        fault="two runs fill one feature cache at the same time",
        does=two_runs,
        exit_code=0,
        seen=r"^both ended with 0 and 0; weights equal: True; left behind: \[\]$",
        limit_s=150,
    ),
    Fault(
        kind="caches",
        fault="one bit altered in every file of a feature cache",
        does=altered_files,
        exit_code=0,
        seen=r"^(\d+) files altered, \1 found broken; weights equal: True$",
        limit_s=150,
    ),
]
