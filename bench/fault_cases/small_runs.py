"""Runs of the real command line in forked processes, which spares the imports: two seconds each."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrl.commands.main import main

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # the tests' tiny configs; a script has its own folder on the path alone
    sys.path.append(str(ROOT))

from tests.runs import arguments, text_config  # noqa: E402

Config = dict[str, Any]
POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (minus a signal's number), and all that it printed."""

    exit_code: int
    output: str

    @property
    def last_line(self) -> str:
        """The line that a user reads first."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def line_with(self, words: str) -> str:
        """The first line that has the words; the last one if none has."""
        found = (line.strip() for line in self.output.splitlines() if words in line)
        return next(found, self.last_line)


def text_run(folder: Path, stage: str = "sft", rows: list[Any] | None = None, steps: int = 6) -> Config:
    """A run on text rows of 2 prompts per step, saved every 2 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "rows.jsonl"
    write_rows(source, text_rows() if rows is None else rows)
    values = text_config(source, stage)
    values["trainer"]["max_steps"] = steps
    values["checkpoint"] = {"every_n_train_steps": 2}
    return values


def text_rows(count: int = 12) -> list[dict[str, Any]]:
    """Questions without media."""
    return [{"id": f"q{i}", "problem": f"What is {i} and {i}?", "answer": str(2 * i)} for i in range(count)]


def write_rows(path: Path, rows: list[Any]) -> None:
    """JSON lines; a row that is bytes or a string is written as it is."""
    with path.open("wb") as file:
        for row in rows:
            text = row if isinstance(row, bytes | str) else json.dumps(row)
            file.write((text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")) + b"\n")


def fit(folder: Path, values: Config, *more: str, **options: Any) -> Ended:
    """`python -m longrl fit` in `folder / "run"`; options are those of `command`."""
    return command(arguments(folder / "run", values, *more), folder, **options)


def command(
    args: list[str],
    folder: Path,
    *,
    before: Callable[[], None] | None = None,
    meanwhile: Callable[[int], bool] | None = None,
    limit_s: float = 150.0,
) -> Ended:
    """`python -m longrl ARGS` in a forked process, as a user types it.

    Args:
        args: the command and its options.
        folder: for what it prints.
        before: called in the process first; it may limit or replace what the command finds.
        meanwhile: called here with the process's id, again and again until it returns True.
        limit_s: the process and all that it started are killed after so long, which is no documented end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    printed = folder / f"output{len(list(folder.glob('output*.txt')))}.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        become_command(args, printed, before)
    deadline = time.monotonic() + limit_s
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if meanwhile is not None and meanwhile(child):
            meanwhile = None
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(POLL_S)
    left = kill_group(child)
    output = printed.read_text(errors="replace")
    return Ended(os.waitstatus_to_exitcode(status), output + ("\nprocesses outlived the command" if left else ""))


def become_command(args: list[str], printed: Path, before: Callable[[], None] | None) -> None:
    """Runs the command and ends this process with its status."""
    os.setpgid(0, 0)
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["longrl", *args]
    logging.getLogger().handlers.clear()  # pytest's own keep what is to be seen here
    status = 1
    try:
        if before is not None:
            before()
        main()
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def kill_group(leader: int, wait_s: float = 5.0) -> bool:
    """Waits for the processes that a command started; kills those that outlive it, and returns whether there were."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return False
        time.sleep(POLL_S)
    os.killpg(leader, signal.SIGKILL)
    return True


def steps_done(folder: Path) -> int:
    """Optimizer steps that the run in `folder / "run"` has done, saved or not."""
    order = folder / "run" / "order.jsonl"
    lines = order.read_text().splitlines() if order.exists() else []
    return max((json.loads(line)[0] for line in lines), default=0)


def steps_saved(folder: Path) -> int:
    """Optimizer steps of the checkpoint that the run in `folder / "run"` goes on from."""
    path = folder / "run" / "checkpoints" / "last.ckpt"
    if path.is_dir():
        path = path / "meta.pt"
    return int(torch.load(path, weights_only=True)["global_step"]) if path.exists() else 0


def steps_lost(folder: Path) -> int:
    """Steps that were done and are in no checkpoint."""
    return max(steps_done(folder) - steps_saved(folder), 0)


def at_step(folder: Path, step: int, act: Callable[[int], None]) -> Callable[[int], bool]:
    """For `command(meanwhile=...)`: `act(pid)` once the run has done so many steps."""

    def look(process: int) -> bool:
        if steps_done(folder) < step:
            return False
        act(process)
        return True

    return look


def kept_checkpoint(folder: Path) -> str:
    """What is kept of a run, in words."""
    saved = steps_saved(folder)
    return f"checkpoint of step {saved}" if saved else "no checkpoint"
