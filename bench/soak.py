"""Many steps of a tiny run with each engine: memory, descriptors, threads, processes and shared memory stay flat.

All are of the run's process and of those that it started. The slope of the resident memory (without pages of files and
of /dev/shm) is a least-squares line through the steps behind the first fifth, in which caches fill.

    python bench/soak.py --steps 1000 --json bench/results/soak.json
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch: one thread suits the tiny models
    os.environ.setdefault(variable, "1")
# oneDNN keeps what it compiles for each shape of a batch, 256 KiB at a time and 1,024 of them by itself: vLLM on a CPU
# would meet new ones throughout a thousand steps.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the tiny runs are those of the tests

import numpy as np  # noqa: E402
from common import console, in_fresh_process, report  # noqa: E402

from tests import runs  # noqa: E402
from tests.soak_watch import FILE, POLICY_STEPS  # noqa: E402

REWARD = "tests.soak_watch.odd"
WARM_UP = 0.2
"""Share of the steps that do not count."""
LIMIT_MIB = 1.0
"""Per 100 steps."""
VLLM = {"max_model_len": 1024, "max_num_seqs": 16, "kv_cache_gib": 1 / 128, "enforce_eager": True}
"""A cache of keys that all steps soon have touched: until then memory grows."""


def main(argv: Sequence[str] | None = None) -> list[dict[str, int | float | str]]:
    """Command line; exits with 1 if memory grows by more than `LIMIT_MIB`, or anything else at all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run")
    parser.add_argument("--engine", help=f"some of {','.join(CASES)}; all that can run here without it")
    parser.add_argument("--quick", action="store_true", help="60 steps of hf and sft")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows, with command and hardware")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps = 60
        arguments.engine = arguments.engine or "hf,sft"
    names = arguments.engine.split(",") if arguments.engine else available()
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="longrl-soak-", ignore_cleanup_errors=True) as folder:
            samples = in_fresh_process(soaked, name, arguments.steps, folder)
        rows.append(row_of(name, samples))
        console.print(rows[-1], highlight=False)
    report(__file__, arguments, rows)
    growing = [row["engine"] for row in rows if not is_flat(row)]
    if growing and argv is None:
        sys.exit(f"not flat: {', '.join(map(str, growing))}")
    return rows


def available() -> list[str]:
    """The cases that can run here."""
    has_vllm = importlib.util.find_spec("vllm") is not None
    return [name for name in CASES if has_vllm or name not in ("vllm", "server")]


# ---- the runs ----


def long_epoch(folder: Path) -> str:
    """The training rows 50 times over: a worker is started for every epoch, which takes seconds."""
    rows = [json.loads(line) for line in (runs.videos() / "train.jsonl").read_text().splitlines()]
    listed = [{**row, "problem_id": f"{row['problem_id']}-{number}"} for number in range(50) for row in rows]
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    return str(path)


def hf(folder: Path) -> Iterator[dict[str, Any]]:
    """RL on real videos: features on disk, a loader worker, validation, checkpoints."""
    values = runs.config("rl")
    values["model"]["feature_cache_dir"] = str(folder / "features")
    values["data"] |= {"train": long_epoch(folder), "val": str(runs.videos() / "eval.jsonl"), "num_workers": 1}
    values["data"]["media_root"] = str(runs.videos())
    values["trainer"] |= {"val_check_interval": 200, "limit_val_batches": 1}
    values["rollout"] = runs.rollouts(REWARD)
    yield values


def sft(folder: Path) -> Iterator[dict[str, Any]]:
    """SFT on the same videos, of which half do not fit the cache of features."""
    values = runs.config("sft")
    values["model"]["feature_cache_bytes"] = 1 << 14
    yield values


def diffusion(folder: Path) -> Iterator[dict[str, Any]]:
    """A tiny SD3 with a moving average and pictures of its validation."""
    from tests.diffusion.runs import config

    yield config(folder)


def vllm(folder: Path) -> Iterator[dict[str, Any]]:
    """vLLM in the trainer's process."""
    from longrl.testing.tiny import tiny_qwen2_5_vl

    values = runs.config("rl", model=str(tiny_qwen2_5_vl(folder / "model", text={"hidden_size": 192})))
    options = {**VLLM, "options": {"block_size": 32}}
    values["rollout"] = runs.rollouts(REWARD)
    values["rollout"]["engine"] = {"class_path": "longrl.engines.vllm.VLLMEngine", "init_args": options}
    yield values


def server(folder: Path) -> Iterator[dict[str, Any]]:
    """A vLLM server that the run starts, whose processes count too."""
    from longrl.testing.tiny import tiny_qwen2_5_vl
    from tests import servers

    values = runs.config("rl", model=str(tiny_qwen2_5_vl(folder / "model", text={"hidden_size": 192})))
    servers.SMALL = [f"--kv_cache_gib={VLLM['kv_cache_gib']}" if "kv_cache" in one else one for one in servers.SMALL]
    running = servers.RunningServer(folder / "server", values, as_typed=True)
    options = {"urls": [running.url], "weights_folder": str(running.weights), "start_timeout_s": 600}
    values["rollout"] = runs.rollouts(REWARD)
    values["rollout"]["engine"] = {"class_path": "longrl.engines.server.VLLMServerEngine", "init_args": options}
    try:
        yield values
    finally:
        running.close()


CASES: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    "hf": hf,
    "sft": sft,
    "diffusion": diffusion,
    "vllm": vllm,
    "server": server,
}


def soaked(name: str, steps: int, folder: str) -> list[dict[str, float]]:
    """What a run used at its steps; called in a process of its own."""
    with contextmanager(CASES[name])(Path(folder)) as values:
        watch = {"class_path": "tests.soak_watch.SoakWatch", "init_args": {"every_n_steps": max(1, steps // 200)}}
        values["trainer"]["callbacks"].append(watch)
        values["trainer"] |= {"max_steps": steps, "max_epochs": -1}
        command = "diffusion fit" if name == "diffusion" else "fit"
        run_folder = runs.run(Path(folder) / "run", values, command=command)
    return [json.loads(line) for line in (run_folder / FILE).read_text().splitlines()]


# ---- the numbers ----


def row_of(name: str, samples: Sequence[dict[str, float]]) -> dict[str, int | float | str]:
    """A run's line of the table; of what should not change, the second half's least and what that grew by.

    The least is what stays: a file that is written as the sample is taken does not count.
    """
    steps = samples[-1][POLICY_STEPS]
    counted = [sample for sample in samples if sample[POLICY_STEPS] > WARM_UP * steps]
    at = [sample[POLICY_STEPS] for sample in counted]
    slope, own_slope = (
        np.polyfit(at, [sample[name] for sample in counted], 1)[0] for name in ("rss_mib", "own_rss_mib")
    )
    row: dict[str, int | float | str] = {
        "steps": int(steps),
        "engine": name,
        "rss_slope_mib_per_100": round(100 * float(slope), 3),
        "own_slope_mib_per_100": round(100 * float(own_slope), 3),
        "rss_first_mib": round(counted[0]["rss_mib"], 1),
        "rss_last_mib": round(counted[-1]["rss_mib"], 1),
    }
    for field in ("fds", "threads", "processes", "shm_bytes"):
        first, last = (min(sample[field] for sample in part) for part in halves(counted))
        row |= {field: int(last), f"{field}_growth": int(last - first)}
    return row


def halves(samples: Sequence[dict[str, float]]) -> tuple[Sequence[dict[str, float]], Sequence[dict[str, float]]]:
    """The first and the second half."""
    middle = max(1, len(samples) // 2)
    return samples[:middle], samples[middle:] or samples


def is_flat(row: dict[str, int | float | str]) -> bool:
    """Whether nothing grew."""
    grown = [row[f"{field}_growth"] for field in ("fds", "threads", "processes", "shm_bytes")]
    return float(row["rss_slope_mib_per_100"]) < LIMIT_MIB and not any(int(number) > 0 for number in grown)


if __name__ == "__main__":
    gc.freeze()
    main()
