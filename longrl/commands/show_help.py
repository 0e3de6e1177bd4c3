"""What `--help` prints: pages that `python -m longrl.commands.write_help` has written, so that it answers at once.

The options of a run are the signatures of Lightning, torch and transformers, whose import takes seconds. A page is a
first screen of its own and the sections that commands share.
"""

from __future__ import annotations

import pydoc
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).with_name("help_pages")
HELP = ("-h", "--help")
_RUN = ("checkpoint", "watchdog", "trainer")
_LANGUAGE = ("classes", "data", "model", "rollout", *_RUN)
_DIFFUSION = ("diffusion_classes", "diffusion_data", "diffusion_model", "diffusion_rollout", *_RUN)
SECTIONS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("fit", "validate", "test", "predict", "cache-features", "plan", "serve"), _LANGUAGE),
    **dict.fromkeys(("diffusion fit", "diffusion validate", "diffusion test"), _DIFFUSION),
}
"""Command -> files of sections behind its own page; the others have none."""


def asks_for_help(args: Sequence[str]) -> bool:
    """Whether a command line has `--help` or `-h`."""
    return any(arg in HELP for arg in args)


def asks_for_class(args: Sequence[str]) -> bool:
    """Whether a command line asks what a class takes, as `--rollout.engine.help CLASS`."""
    return any(arg.startswith("--") and arg.partition("=")[0].endswith(".help") for arg in args)


def page_name(args: Sequence[str]) -> str:
    """The command that a command line begins with, as pages are named after it."""
    if args[0] == "diffusion" and len(args) > 1 and f"diffusion {args[1]}" in SECTIONS:
        return f"diffusion {args[1]}"
    return "plan --async" if args[0] == "plan" and "--async" in args else args[0]


def page_file(name: str) -> Path:
    """The file of a command's own page, or of a section."""
    return FOLDER / f"{name.replace(' --', '_').replace(' ', '_')}.txt"


def help_page(command: str) -> str | None:
    """The whole page of a command; None if none was written."""
    if not page_file(command).is_file():
        return None
    names = (command, *SECTIONS.get(command, ()))
    return "\n".join(page_file(name).read_text(encoding="utf-8") for name in names)


def show(text: str) -> None:
    """Prints a page; on a terminal that is too low for it by its pager, which begins with the first screen."""
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        pydoc.pager(text)
    else:
        sys.stdout.write(text)
