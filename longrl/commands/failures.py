"""What a command says of an error: one line, and of one that nobody foresaw the file that has its traceback."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

from longrl.io.exit_codes import MISTAKE
from longrl.io.one_line import one_line
from longrl.io.secrets import mask_secrets

TRACEBACK_FILE = "traceback.txt"
"""In the folder of a run; of another rank than the first `rankN.traceback.txt`."""
MAX_CHARACTERS = 2000
FAILED = 1
"""Status of an error that is no mistake of the user's."""
_PACKAGE = Path(__file__).parents[1]
_folders: list[Path] = []


def keep_tracebacks_in(folder: str | Path | None) -> None:
    """Names the folder that tracebacks go to from now on; None is the system's folder for temporary files."""
    _folders[:] = [] if folder is None else [Path(folder)]


def tell_error(error: BaseException) -> int:
    """Says in one line what went wrong, and returns the status that the command ends with.

    A user's mistake needs no traceback; that of anything else goes to a file which the line names. With
    LONGRL_TRACEBACK=1 it is printed too.
    """
    found = find_mistake(error)
    rank = own_rank()
    text = str(found) if found is not None else f"{_describe(error)} ({_place(error)})"
    where = "" if found is not None and rank is None else f"; the traceback is in {_write_traceback(error, rank or 0)}"
    with contextlib.suppress(OSError, ValueError):  # nobody reads what a closed terminal is told
        if os.environ.get("LONGRL_TRACEBACK", "0") not in ("", "0"):
            sys.stderr.write(mask_secrets("".join(traceback.format_exception(error))))
        said_by = "longrl: error" if rank is None else f"longrl: error on rank {rank}"
        sys.stderr.write(f"{said_by}: {one_line(mask_secrets(text), MAX_CHARACTERS)}{where}\n")
        sys.stderr.flush()
    return MISTAKE if found is not None else FAILED


def find_mistake(error: BaseException | None) -> ValueError | None:
    """The ValueError that longrl raised itself, in what others made of it (jsonargparse: a page); None without one."""
    while error is not None:
        modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError) and modules and modules[-1].startswith("longrl."):
            return error
        error = error.__cause__
    return None


def own_rank() -> int | None:
    """This process's number in a run of several processes; None in a run of one."""
    names = []
    if "LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        names = ["RANK", "LOCAL_RANK"]  # of torchrun; of Lightning, also in the shell of an interactive job
    if os.environ.get("SLURM_NTASKS", "1") != "1":
        names.append("SLURM_PROCID")
    if not names:
        return None
    named = (os.environ.get(name, "") for name in names)
    return next((int(text) for text in named if text.isdigit()), 0)


def _describe(error: BaseException) -> str:
    kind = type(error).__name__
    return f"{kind}: {error}" if str(error) else kind


def _place(error: BaseException) -> str:
    """File and line of longrl's own code that an error came through last, or of the code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not frames:
        return "no traceback"
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    shown = path.relative_to(_PACKAGE.parent) if own else path
    return f"{shown}, line {frame.lineno}"


def _write_traceback(error: BaseException, rank: int) -> Path | str:
    """Path of the file that an error's traceback was written to."""
    text = mask_secrets("".join(traceback.format_exception(error)))
    name = f"rank{rank}.{TRACEBACK_FILE}" if rank else TRACEBACK_FILE
    for folder in _folders:
        with contextlib.suppress(OSError):
            path = folder / name
            if folder.is_dir():
                path.write_text(text, encoding="utf-8", errors="backslashreplace")
                return path
    try:
        handle, file = tempfile.mkstemp(prefix="longrl-", suffix=f".{name}")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as opened:
            opened.write(text)
    except OSError as failed:
        return f"no file ({failed}): set LONGRL_TRACEBACK=1"
    return file
