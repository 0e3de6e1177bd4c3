"""Processes that are killed where nobody can clean up."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import at_step, fit, kept_checkpoint, steps_lost, text_run

LAST = "checkpoints/last.ckpt"


def killed_then_resumed(folder: Path) -> Outcome:
    """kill -9 after a save and a half; what the run goes on to is compared with one that nobody disturbed."""
    values = text_run(folder)
    ended = fit(folder, values, meanwhile=at_step(folder, 3, lambda process: os.kill(process, signal.SIGKILL)))
    lost, kept = steps_lost(folder), kept_checkpoint(folder)
    resumed = fit(folder, values, f"--ckpt_path={folder / 'run' / LAST}")
    undisturbed = fit(folder / "undisturbed", values)
    states = [torch.load(run / "run" / LAST, weights_only=True) for run in (folder, folder / "undisturbed")]
    equal = all(map(torch.equal, *(state["state_dict"].values() for state in states)))
    seen = f"resumed with {resumed.exit_code}, undisturbed {undisturbed.exit_code}, weights equal: {equal}"
    return Outcome(seen, ended.exit_code, kept, lost)


FAULTS = [
    Fault(
        kind="signals",
        fault="kill -9 in the middle of an SFT run, resumed",
        does=killed_then_resumed,
        exit_code=-signal.SIGKILL,
        seen="resumed with 0, undisturbed 0, weights equal: True",
        lost_steps=2,
    ),
]
