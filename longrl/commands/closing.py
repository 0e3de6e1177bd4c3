"""The last lines of a command: what was written where, and which command comes next."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from longrl.commands.console import say

MAX_LINES = 4
_without_next: list[bool] = []
"""Not empty while a command runs others, whose next one it knows itself."""


@contextlib.contextmanager
def without_next() -> Iterator[None]:
    """Has commands in the block say what they wrote alone."""
    _without_next.append(True)
    try:
        yield
    finally:
        _without_next.pop()


def say_end(written: Sequence[str], following: Sequence[str] = ()) -> None:
    """Says what was written, and what to run next.

    Args:
        written: lines such as `checkpoint: PATH`.
        following: command lines without `python -m longrl` in front, or other lines that say what to do.
    """
    lines = [*written, *([] if _without_next else [f"next: {text}" for text in following])]
    for line in lines[:MAX_LINES]:
        say(line)


def longrl(*args: object) -> str:
    """A command line of longrl as a user types it."""
    return shlex.join(["python", "-m", "longrl", *map(str, args)])


def end_of_fit(
    run_dir: str, step: int, data: Mapping[str, Any], prog: Sequence[str] = (), configs: Sequence[str] = ()
) -> None:
    """What a training run left, and what its weights are for.

    Args:
        run_dir: its folder.
        step: optimizer steps done.
        data: options of the data module.
        prog: between `longrl` and the command; `diffusion` of one that makes pictures.
        configs: files that the command named.
    """
    last = Path(run_dir, "checkpoints", "last.ckpt")
    checkpoint = f"checkpoint {last}" if last.exists() else "no checkpoint (checkpoint.save_last is off)"
    written = [f"done: step {step}, {checkpoint}; curves: {longrl('report', run_dir)}"]
    if not last.exists():
        say_end(written)
        return
    test = data.get("test")
    named = () if test else ("--test", "FILE")
    following = [longrl(*prog, "test", "--weights", run_dir, *named)]
    if not prog and data.get("stage") == "sft":
        reward = ("--reward", "configs/reward/think_answer.yaml")
        stage_2 = ("RL.yaml", *reward, "--init_from", run_dir, "--out", f"{run_dir}_rl")
        own = second_stage(run_dir, configs)
        following.append(longrl("fit", "--config", *((own, "--resume", "auto") if own else stage_2)))
    following.append(longrl("export", "--run", run_dir, "--out", f"{run_dir}_export"))
    say_end(written, following)


def second_stage(run_dir: str, configs: Sequence[str]) -> Path | None:
    """The rl.yaml beside a run's one config that begins with the run's weights: `init` writes such a pair."""
    if len(configs) != 1:
        return None
    file = Path(configs[0]).with_name("rl.yaml")
    try:
        init_from = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["init_from"]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):  # it is something else
        return None
    return file if isinstance(init_from, str) and Path(init_from) == Path(run_dir) else None


def end_of_export(out: str, run: str, step: int | None, dtype: str, loader: str) -> None:
    """What an exported folder is, and how it is loaded.

    Args:
        out: the folder.
        run: that it is of.
        step: optimizer steps of the checkpoint; None of weights that were never trained.
        dtype: of the weights.
        loader: an expression of Python that loads it.
    """
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file()) / 2**30
    of_step = "the weights" if step is None else f"step {step}"
    written = [f"exported: {of_step} of {run} to {out} ({dtype}, {size:.2f} GiB)"]
    following = [f"load it in Python by {loader}"]
    if loader.startswith("transformers."):
        following += [f"vllm serve {shlex.quote(out)} --dtype {dtype}"]
        benchmark = ("--config", "configs/eval/longvideo_reason.yaml")
        following += [longrl("evaluate", *benchmark, "--weights", out, "--out", f"{out}_eval")]
    say_end(written, following)
