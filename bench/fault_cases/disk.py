"""Disks that are full, and folders that cannot be written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import fit, kept_checkpoint, steps_lost, text_run
from longrl.io import checksums, disk_space

LAST = "checkpoints/last.ckpt"


def full_disk(folder: Path) -> Outcome:
    """The second save finds no room."""
    saved = folder / "run" / LAST
    write = checksums.SummedFile.write

    def refuse(self: Any, data: Any) -> int:
        if saved.exists():
            self.error = OSError(28, "No space left on device")
            raise self.error
        return write(self, data)

    def fill() -> None:
        checksums.SummedFile.write = refuse  # type: ignore[method-assign]

    ended = fit(folder, text_run(folder), before=fill)
    return Outcome(ended.line_with("longrl: error:"), ended.exit_code, kept_checkpoint(folder), steps_lost(folder))


def little_room(folder: Path) -> Outcome:
    """Less room than the checkpoints of the run will need."""

    def shrink() -> None:
        # Whoever started this process may keep its log elsewhere.
        logging.getLogger("longrl").addHandler(logging.StreamHandler())
        disk_space.free_bytes = lambda folder: 1000  # type: ignore[assignment]

    ended = fit(folder, text_run(folder, steps=2), before=shrink)
    return Outcome(ended.line_with("are free"), ended.exit_code, kept_checkpoint(folder))


def no_folder(folder: Path) -> Outcome:
    """A file stands where the run's folder should be."""
    values = text_run(folder, steps=2)
    (folder / "file").write_text("")
    ended = fit(folder, values, f"--run_dir={folder / 'file' / 'run'}")
    return Outcome(ended.line_with("longrl: error:"), ended.exit_code, "nothing was begun")


FAULTS = [
    Fault("disk", "the disk is full at the second save", full_disk, 2, r"could not be written \(No space left", 2),
    Fault("disk", "less room than the checkpoints need", little_room, 0, "needs .* GiB for .* but .* GiB are free"),
    Fault("disk", "the run's folder cannot be made", no_folder, 2, r"--run_dir=.* cannot be written"),
]
