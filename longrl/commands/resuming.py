"""`--resume auto`: which checkpoint a run goes on from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from longrl.io.checkpoint_files import check_checkpoint
from longrl.modules.initial_weights import SIGNAL_CHECKPOINT, saved_checkpoints

logger = logging.getLogger(__name__)


def last_good_checkpoint(run_dir: str, *, reads: bool = True) -> Path | None:
    """The checkpoint that a run goes on from, the last one that can be read; None if the folder has none at all.

    Args:
        run_dir: the run's folder.
        reads: look at all of their bytes. One rank does, whose choice counts: many that do are slow.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    problems: list[str] = []
    for path in candidates(Path(run_dir)):
        problem = problem_of(path, reads)
        if problem is None:
            for other in problems:
                logger.warning("--resume auto skips %s; it goes on from %s", other, path)
            return _name_to_load(path)
        problems.append(problem if str(path) in problem else f"{path}: {problem}")
    if problems:
        raise ValueError(
            f"--resume auto finds no checkpoint in --run_dir={run_dir} that can be read: {'; '.join(problems)}. "
            "Restore one from a backup, or name another --run_dir to start anew"
        )
    return None


def candidates(run: Path) -> Iterator[Path]:
    """The checkpoints in a run's folder in the order to try them; one that is being replaced under its other name."""
    last = run / "checkpoints" / "last.ckpt"
    before = last.with_name(f".{last.name}.before")
    lasting = [path for path in (last, before) if path.exists()]
    others = [path for path in saved_checkpoints(run) if path != last and path.exists()]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    newest = others[:1]
    if newest and SIGNAL_CHECKPOINT.fullmatch(newest[0].name) and _is_newer(newest[0], lasting):
        yield from newest  # of an older release, which left its last steps there
        others = others[1:]
    yield from lasting
    yield from others


def _is_newer(path: Path, others: list[Path]) -> bool:
    return all(path.stat().st_mtime >= other.stat().st_mtime for other in others)


def problem_of(checkpoint: Path, reads: bool) -> str | None:
    """What keeps a checkpoint from being read: torn, incomplete or damaged; None if nothing does."""
    try:
        check_checkpoint(checkpoint, contents=reads)
    except ValueError as error:
        return str(error)
    return None


def _name_to_load(path: Path) -> Path:
    """The usual name of a checkpoint that was being replaced, if it is free: the strategy puts it there."""
    usual = path.with_name("last.ckpt")
    return usual if path.name == ".last.ckpt.before" and not usual.exists() else path
