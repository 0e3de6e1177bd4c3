"""How a training run ends: by itself, by a signal or by an error, on one rank or many, and with which exit code."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from longrl.commands.ranks import (
    is_first_rank,
    is_started_rank,
    started_ranks,
    stop_ranks,
    take_ranks,
    wait_for_ranks,
)
from longrl.io.exit_codes import STOPPED
from longrl.io.shipped_files import name_of
from longrl.io.stop_signals import StopRun, StopSignals, current_signals
from longrl.modules.initial_weights import saved_checkpoints


def advice(command: str, run_dir: str) -> str:
    """Which checkpoint there is, and how to go on.

    Args:
        command: as `resume_command` has it.
        run_dir: the run's folder.
    """
    saved = saved_checkpoints(Path(run_dir))
    there = f"checkpoint: {saved[0]}" if saved else "no checkpoint yet"
    return f"{there}; go on by: {command}"


def resume_command(prog: str, args: Sequence[str]) -> str:
    """The command that goes on with the run that `args` began."""
    resumes = "--resume=auto" in args or ("--resume", "auto") in itertools.pairwise(args)
    return shlex.join([*prog.split(), *map(name_of, args), *([] if resumes else ["--resume", "auto"])])


@contextlib.contextmanager
def ending_of_run(trainer: Trainer, how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Has `fit` in the block end all its ranks, with one exit code that says what happened.

    Args:
        trainer: of the run.
        how_to_go_on: see `advice`.

    Raises:
        StopRun: a signal asked for it, whether the step could be saved or not.
        SystemExit: a rank failed after this one had ended its work, or another process ends with the run's code.
    """
    signals = current_signals()
    if signals is not None:
        signals.speaks = is_first_rank()
        signals.is_launched = is_started_rank(trainer)
        signals.advice = how_to_go_on
        signals.children = functools.partial(started_ranks, trainer)
    try:
        yield
    except BaseException as error:
        is_asked = signals is not None and signals.is_deferred
        ranks = take_ranks(trainer)
        if signals is not None:
            signals.children = lambda: ranks
        if isinstance(error, StopRun):
            wait_for_ranks(ranks)
        else:
            stop_ranks(ranks)
        if signals is None or not is_asked or not told(signals, error, how_to_go_on):
            raise
        if signals.is_launched:
            raise StopRun(trainer.global_step, code=0) from error
        code = error.code if isinstance(error, StopRun) and isinstance(error.code, int) else STOPPED
        raise StopRun(trainer.global_step, code) from error
    problem = wait_for_ranks(take_ranks(trainer))
    if problem:
        raise SystemExit(f"longrl: error: {problem}")


def told(signals: StopSignals, error: BaseException, how_to_go_on: Callable[[], str]) -> bool:
    """Says how a run ended that was asked to stop; False of one that nobody asked."""
    name = signals.requested.name if signals.requested else "a signal to another rank"
    if isinstance(error, StopRun):
        name = error.reason or name
        signals.tell(f"{name}: stopped at step {error.step}; {how_to_go_on()}")
    elif signals.requested:  # it reached others too: a worker, or the engine's processes
        reason = " ".join(str(error).split()) or type(error).__name__
        signals.tell(f"{name}: the step failed and is abandoned ({reason}); {how_to_go_on()}")
    return isinstance(error, StopRun) or signals.requested is not None
