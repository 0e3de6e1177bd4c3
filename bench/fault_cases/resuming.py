"""Runs that go on elsewhere than they stopped: with other workers, in another folder, by another clock."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Config, at_step, command, fit, kept_checkpoint, steps_lost, text_run

from tests.runs import arguments, rollouts  # isort: skip  (its folder is on the path since the line before)

LAST = "checkpoints/last.ckpt"
EQUAL = "^resumed with 0; weights equal: True; steps logged: 0 1 2 3 4 5$"


def kill_after(folder: Path, values: Config, step: int = 3) -> Outcome:
    """A run that is killed behind a checkpoint and a step."""
    ended = fit(folder, values, meanwhile=at_step(folder, step, lambda process: os.kill(process, signal.SIGKILL)))
    return Outcome("", ended.exit_code, kept_checkpoint(folder), steps_lost(folder))


def logged_steps(run: Path) -> str:
    """Steps of all lines of metrics.csv that are of training, in their order."""
    (file,) = run.glob("logs/version_*/metrics.csv")
    with file.open(newline="") as lines:
        return " ".join(row["step"] for row in csv.DictReader(lines) if row["train/loss"])


@functools.cache
def undisturbed() -> list[Tensor]:
    """Weights at the end of the run that nobody disturbed."""
    with tempfile.TemporaryDirectory(prefix="longrl-fault-") as name:
        folder = Path(name)
        fit(folder, text_run(folder))
        return list(torch.load(folder / "run" / LAST, weights_only=True)["state_dict"].values())


def compared(run: Path, exit_code: int) -> str:
    """What a resumed run led to, beside the run that nobody disturbed."""
    weights = torch.load(run / LAST, weights_only=True)["state_dict"].values()
    equal = all(map(torch.equal, weights, undisturbed()))
    return f"resumed with {exit_code}; weights equal: {equal}; steps logged: {logged_steps(run)}"


def resumed(folder: Path, *more: str, break_it: Callable[[Path], Path] | None = None, before: object = None) -> Outcome:
    """A run that is killed, and goes on with further options or once its folder was changed."""
    values = text_run(folder)
    killed = kill_after(folder, values)
    run = folder / "run"
    if break_it is not None:
        run = break_it(run)
    args = arguments(run, values, f"--ckpt_path={run / LAST}", *more)
    ended = command(args, folder, before=before)  # type: ignore[arg-type]
    seen = compared(run, ended.exit_code)
    return Outcome(seen, killed.exit_code, killed.kept, killed.lost_steps)


def moved(run: Path) -> Path:
    """The folder under another name, as on another node."""
    target = run.parent / "elsewhere" / "renamed"
    target.parent.mkdir()
    return Path(shutil.move(run, target))


def torn_metrics(run: Path) -> Path:
    """What a power cut leaves of the last lines: half of one, and zeros."""
    (file,) = run.glob("logs/version_*/metrics.csv")
    with file.open("ab") as lines:
        lines.write(b"5,0,1.5\n4,0" + b"\0" * 64)
    return run


def clock_of_1999() -> None:
    """A clock that was set back."""
    time.time = lambda: 930_000_000.0


def samples_once(folder: Path) -> Outcome:
    """Samples of the steps behind the checkpoint are written anew: none stands there twice."""
    values = text_run(folder, "rl")
    values["rollout"] = rollouts(max_resample_rounds=0)
    shown = {"class_path": "longrl.callbacks.generations.Generations", "init_args": {"every_n_steps": 1}}
    values["trainer"]["callbacks"].append(shown)
    killed = kill_after(folder, values, step=5)
    ended = fit(folder, values, f"--ckpt_path={folder / 'run' / LAST}")
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    per_step = " ".join(f"{step}:{steps.count(step)}" for step in sorted(set(steps)))
    seen = f"resumed with {ended.exit_code}; samples of a step: {per_step}"
    return Outcome(seen, killed.exit_code, killed.kept, killed.lost_steps)


def on_two_ranks(folder: Path) -> Outcome:
    """A single-file checkpoint of one process goes on under the strategy for many ranks."""
    values = text_run(folder)
    killed = kill_after(folder, values)
    strategy = ["--trainer.devices=2", "--trainer.strategy=longrl.strategies.mr_sp.MRSPStrategy"]
    strategy += ["--data.prompts_per_batch=1", f"--ckpt_path={folder / 'run' / LAST}"]
    ended = fit(folder, values, *strategy, limit_s=150)
    seen = f"resumed with {ended.exit_code}; steps logged: {logged_steps(folder / 'run')}"
    return Outcome(seen, killed.exit_code, killed.kept, killed.lost_steps)


FAULTS = [
    Fault(
        kind="resuming",
        fault="killed, and resumed with 2 loader workers instead of none",
        does=lambda folder: resumed(folder, "--data.num_workers=2"),
        exit_code=-signal.SIGKILL,
        seen=EQUAL,
        lost_steps=2,
        limit_s=150,
    ),
    Fault(
        kind="resuming",
        fault="killed, its folder moved, and resumed there",
        does=lambda folder: resumed(folder, break_it=moved),
        exit_code=-signal.SIGKILL,
        seen=EQUAL,
        lost_steps=2,
        limit_s=150,
    ),
    Fault(
        kind="resuming",
        fault="the end of metrics.csv torn by a power cut, with a line of a step that is repeated",
        does=lambda folder: resumed(folder, break_it=torn_metrics),
        exit_code=-signal.SIGKILL,
        seen=EQUAL,
        lost_steps=2,
        limit_s=150,
    ),
    Fault(
        kind="resuming",
        fault="resumed under a clock set back to 1999",
        does=lambda folder: resumed(folder, before=clock_of_1999),
        exit_code=-signal.SIGKILL,
        seen=EQUAL,
        lost_steps=2,
        limit_s=150,
        quick=False,
    ),
    Fault(
        kind="resuming",
        fault="killed between samples and the next checkpoint, and resumed",
        does=samples_once,
        exit_code=-signal.SIGKILL,
        seen="^resumed with 0; samples of a step: 1:4 2:4 3:4 4:4 5:4 6:4$",
        lost_steps=2,
        limit_s=150,
    ),
    Fault(
        kind="resuming",
        fault="a run of one process resumed on two ranks",
        does=on_two_ranks,
        exit_code=-signal.SIGKILL,
        seen="^resumed with 0; steps logged: 0 1 2 3 4 5$",
        lost_steps=2,
        limit_s=200,
        quick=False,
    ),
]
