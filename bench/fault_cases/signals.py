"""Signals that ask a run or another command to end, and runs that share a folder."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Config, at_step, fit, kept_checkpoint, steps_lost, text_run
from longrl.io.exit_codes import INTERRUPTED, MISTAKE, STOPPED
from longrl.io.folder_lock import FolderLock

LAST = "checkpoints/last.ckpt"
BEGUN = "slow_step_begun"
SLOW_STEP = "fault_cases.signals.SlowStep"
EQUAL = "resumed with 0, undisturbed 0, weights equal: True"


class SlowStep(Callback):
    """Steps long enough for a signal to meet them; the file `BEGUN` says that one has begun."""

    def __init__(self, seconds: float, from_step: int = 0) -> None:
        self.seconds = seconds
        self.from_step = from_step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= self.from_step:
            Path(trainer.default_root_dir, BEGUN).touch()
            time.sleep(self.seconds)


def slow_run(folder: Path, seconds: float = 0.1, from_step: int = 0, every_n_train_steps: int = 1000) -> Config:
    """A run of six steps that saves nothing by itself before its end."""
    values = text_run(folder)
    values["checkpoint"] = {"every_n_train_steps": every_n_train_steps}
    options = {"seconds": seconds, "from_step": from_step}
    values["trainer"]["callbacks"].append({"class_path": SLOW_STEP, "init_args": options})
    return values


def sender(*numbers: int, pause_s: float = 0.0) -> Callable[[int], None]:
    """Sends signals to a process, one after the other."""

    def send(process: int) -> None:
        for number in numbers:
            os.kill(process, number)
            time.sleep(pause_s)

    return send


def in_slow_step(folder: Path, act: Callable[[int], None]) -> Callable[[int], bool]:
    """For `command(meanwhile=...)`: `act(pid)` once the run is in a slow step."""

    def look(process: int) -> bool:
        if not (folder / "run" / BEGUN).exists():
            return False
        act(process)
        return True

    return look


def stopped_then_resumed(folder: Path, *numbers: int) -> Outcome:
    """Signals in the third step; the run goes on and is compared with one that nobody disturbed."""
    values = slow_run(folder)
    ended = fit(folder, values, meanwhile=at_step(folder, 2, sender(*numbers)))
    lost, kept = steps_lost(folder), kept_checkpoint(folder)
    resumed = fit(folder, values, "--resume=auto")
    undisturbed = fit(folder / "undisturbed", values)
    states = [torch.load(run / "run" / LAST, weights_only=True) for run in (folder, folder / "undisturbed")]
    equal = all(map(torch.equal, *(state["state_dict"].values() for state in states)))
    after = f"resumed with {resumed.exit_code}, undisturbed {undisturbed.exit_code}, weights equal: {equal}"
    return Outcome(f"{ended.line_with('stopped at step')} ({after})", ended.exit_code, kept, lost)


def a_second_ctrl_c(folder: Path) -> Outcome:
    values = slow_run(folder, 300.0, from_step=3, every_n_train_steps=2)
    twice = sender(signal.SIGINT, signal.SIGINT, pause_s=1.2)
    ended = fit(folder, values, meanwhile=in_slow_step(folder, twice))
    return Outcome(
        ended.line_with("second Ctrl-C: ended"), ended.exit_code, kept_checkpoint(folder), steps_lost(folder)
    )


def a_step_without_end(folder: Path) -> Outcome:
    values = slow_run(folder, 300.0, from_step=3, every_n_train_steps=2)
    values["checkpoint"]["stop_within_s"] = 0.5
    ended = fit(folder, values, meanwhile=in_slow_step(folder, sender(signal.SIGUSR1)))
    return Outcome(ended.line_with("abandoned"), ended.exit_code, kept_checkpoint(folder), steps_lost(folder))


def before_the_first_step(folder: Path) -> Outcome:
    values = text_run(folder)
    config = folder / "run" / "config.yaml"

    def look(process: int) -> bool:
        if not config.exists():  # written in the set-up
            return False
        os.kill(process, signal.SIGTERM)
        return True

    values["trainer"]["callbacks"].append({"class_path": "fault_cases.signals.SlowSetup"})
    ended = fit(folder, values, meanwhile=look)
    return Outcome(ended.line_with("interrupted"), ended.exit_code, kept_checkpoint(folder))


class SlowSetup(Callback):
    """A run that takes its time before it trains."""

    def on_fit_start(self, trainer, pl_module):
        time.sleep(300)


def two_runs_in_a_folder(folder: Path) -> Outcome:
    values = text_run(folder)
    lock = FolderLock(folder / "run", "--run_dir")
    ended = fit(folder, values, "--resume=auto")
    lock.release()
    return Outcome(ended.last_line, ended.exit_code, "the first run, untouched")


def a_second_fit_without_resume(folder: Path) -> Outcome:
    values = text_run(folder, steps=2)
    fit(folder, values)
    before = (folder / "run" / "config.yaml").read_bytes()
    values["trainer"]["max_steps"] = 4
    ended = fit(folder, values)
    same = (folder / "run" / "config.yaml").read_bytes() == before
    return Outcome(ended.last_line, ended.exit_code, f"{kept_checkpoint(folder)}; config.yaml as before: {same}")


def last_checkpoint_torn(folder: Path) -> Outcome:
    """Another one is whole."""
    values = text_run(folder)
    values["checkpoint"] |= {"save_top_k": -1, "filename": "{step}"}
    fit(folder, values, "--trainer.max_steps=4")
    last = folder / "run" / LAST
    os.truncate(last, last.stat().st_size // 2)
    ended = fit(folder, values, "--resume=auto")
    return Outcome(ended.line_with("skips"), ended.exit_code, kept_checkpoint(folder))


STOPPING = [
    Fault(
        kind="signals",
        fault=f"{' and '.join(signal.Signals(number).name for number in numbers)} in a step, resumed",
        does=functools.partial(lambda folder, numbers: stopped_then_resumed(folder, *numbers), numbers=numbers),
        exit_code=STOPPED,
        seen=rf"stopped at step \d; checkpoint: .*--resume auto \({EQUAL}\)",
        limit_s=180.0,  # three runs
    )
    for numbers in ((signal.SIGTERM,), (signal.SIGINT,), (signal.SIGHUP,), (signal.SIGUSR1, signal.SIGTERM))
]

FAULTS = [
    *STOPPING,
    Fault(
        kind="signals",
        fault="a second Ctrl-C in a step",
        does=a_second_ctrl_c,
        exit_code=INTERRUPTED,
        seen=r"ended at once; checkpoint: .*; go on by: python -m longrl fit",
        lost_steps=1,
        limit_s=180.0,
    ),
    Fault(
        kind="signals",
        fault="SIGUSR1 in a step longer than checkpoint.stop_within_s",
        does=a_step_without_end,
        exit_code=STOPPED,
        seen=r"did not end within checkpoint\.stop_within_s=0\.5 and is abandoned; checkpoint: ",
        lost_steps=1,
        limit_s=180.0,
    ),
    Fault(
        kind="signals",
        fault="SIGTERM before the first step",
        does=before_the_first_step,
        exit_code=128 + signal.SIGTERM,
        seen="SIGTERM: `fit` is interrupted",
        limit_s=180.0,
    ),
    Fault(
        kind="signals",
        fault="two runs in one run_dir",
        does=two_runs_in_a_folder,
        exit_code=MISTAKE,
        seen=r"--run_dir=\S+ is in use by process \d+ on \S+ since",
    ),
    Fault(
        kind="signals",
        fault="a second fit into a run's folder, with another config",
        does=a_second_fit_without_resume,
        exit_code=MISTAKE,
        seen=r"holds a run already, which `fit` does not replace; --resume auto goes on",
    ),
    Fault(
        kind="checkpoints",
        fault="last.ckpt torn, --resume auto",
        does=last_checkpoint_torn,
        exit_code=0,
        seen=r"--resume auto skips .*last\.ckpt.*; it goes on from .*step=4\.ckpt",
        limit_s=180.0,  # two runs
    ),
]
