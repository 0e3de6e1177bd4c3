"""What a command says beside its results: lines with the time since its start, without libraries' own affairs."""

from __future__ import annotations

import importlib
import logging
import sys
import time
import warnings
from importlib.util import find_spec

from typing_extensions import override

from longrl.commands.failures import own_rank

STARTED = time.monotonic()
"""When this process imported its first module of longrl, about when it started."""
WARNINGS = (
    "LightningCLI's args parameter",  # it takes no part of a command line
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # its own affair
    r"It is recommended to use `self\.log\('[^']*', \.\.\., sync_dist=True\)`",  # our means are of all ranks already
    r"`torch\.distributed\.reduce_op` is deprecated",  # vLLM's affair
    r"Be aware that when using `ckpt_path`, .* callbacks: \['RunWatch'\]",  # it watches training alone
    r"Total length of `\w+` across ranks is zero",  # of loaders for validation: most runs have none
)
"""How warnings of libraries begin that tell a user nothing."""
LINES = {
    "lightning.pytorch.utilities.rank_zero": (
        "Tip: For seamless",  # recommends another package of its maker
        "GPU available:",  # `fit` says the devices that it uses
        "TPU available:",
        "HPU available:",
        "distributed_backend=",  # between rules; `fit` says how many processes meet
        "`Trainer.fit` stopped:",  # the end of the command says so
    ),
    "lightning.fabric.utilities.seed": ("Seed set to",),
    "lightning.fabric.utilities.rank_zero": ("Seed set to",),
    "lightning.fabric.utilities.distributed": ("Initializing distributed:",),  # a line of each rank
    "lightning.pytorch.accelerators.cuda": ("LOCAL_RANK:",),
    "vllm.triton_utils.importing": ("Triton is installed, but doesn't include CPU backend",),
    "huggingface_hub.utils._http": ("Retrying in",),  # the line before says why
}
"""Logger -> how its lines begin that tell a user nothing."""


def quiet_libraries() -> None:
    """Leaves out what libraries say in every run and nobody can act on; each is named, all else is shown."""
    for text in WARNINGS:
        warnings.filterwarnings("ignore", text)
    for name in LINES:
        logging.getLogger(name).addFilter(is_for_users)


def quiet_bars(command: str) -> None:
    """Leaves out the bars of libraries that load weights where no terminal redraws them: each is a line of fragments.

    Args:
        command: that loads them; diffusers is loaded for its own alone.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return
    libraries = ["transformers", *(["diffusers"] if command == "diffusion" and find_spec("diffusers") else [])]
    for library in libraries:
        importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def is_for_users(record: logging.LogRecord) -> bool:
    """False of a line that `LINES` leaves out."""
    text = record.getMessage()
    return not any(start in text for start in LINES.get(record.name, ()))


class Lines(logging.Formatter):
    """`[12.3 s] text` of what is under way, `warning: text` of what may be wrong."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        rank = own_rank()
        who = f" (rank {rank})" if rank else ""
        if record.levelno >= logging.WARNING:
            return f"{record.levelname.lower()}{who}: {text}"
        return f"[{time.monotonic() - STARTED:.1f} s]{who} {text}"


def speak() -> None:
    """Shows what longrl's own modules log: warnings of every rank, and of the first what is under way."""
    log = logging.getLogger("longrl")
    if log.handlers or logging.getLogger().handlers:  # whoever configured logging has chosen
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    log.addHandler(handler)
    log.setLevel(logging.WARNING if own_rank() else logging.INFO)


def say(text: str) -> None:
    """One line of a result, on the standard output; of many ranks the first one says it."""
    if own_rank() or sys.stdout is None:
        return
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
