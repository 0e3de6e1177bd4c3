"""Short names of the options that everybody sets, such as `--lr`: one table, read before a command's own parser."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

_FILES = {
    "family": "model.family",
    "algorithm": "model.algorithm",
    "reward": "rollout.reward",
    "engine": "rollout.engine",
}
"""Whose values are files of `configs/`, which single options stand behind."""
_WEIGHTS = {"weights": "model.family.init_args.model"}
_PIXELS = {"max_pixels": "model.family.init_args.max_pixels"}
_ROWS = {"train": "data.train", "val": "data.val", "test": "data.test", "batch": "data.prompts_per_batch"}
_FRAMES = {"frames": "data.video.max_frames"}
_FPS = {"fps": "data.video.fps"}
_SAMPLING = {
    "generations": "rollout.sampling.num_generations",
    "max_tokens": "rollout.sampling.max_completion_tokens",
    "temperature": "rollout.sampling.temperature",
}
_STEPS = {"lr": "model.optimizer.lr", "steps": "trainer.max_steps", "save_every": "checkpoint.every_n_train_steps"}
_MACHINE = {"devices": "trainer.devices", "nodes": "trainer.num_nodes"}
_RUN = {"precision": "trainer.precision", "seed": "seed_everything", "out": "run_dir"}

_PARTS = {"family": "model.family", **_WEIGHTS, **_PIXELS, "train": "data.train", **_FPS}
_FIT = {
    **_FILES,
    **_WEIGHTS,
    **_PIXELS,
    "init_from": "model.init_from",
    "stage": "data.stage",
    **_ROWS,
    **_FRAMES,
    **_FPS,
    **_SAMPLING,
    **_STEPS,
    **_MACHINE,
    **_RUN,
}
_TEST = {
    "family": "model.family",
    "reward": "rollout.reward",
    "engine": "rollout.engine",
    "weights": "model.init_from",
    **_PIXELS,
    "test": "data.test",
    "limit": "data.max_eval_rows",
    **_FRAMES,
    **_FPS,
    "max_tokens": "rollout.eval_sampling.max_completion_tokens",
    **_MACHINE,
    **_RUN,
}
_OF_PICTURES = ("reward", "weights", "init_from", "train", "val", "test", "batch")

ALIASES: Mapping[str, Mapping[str, str]] = {
    "fit": _FIT,
    "validate": {**_TEST, "val": "data.val"},
    "test": _TEST,
    "predict": _TEST,
    "evaluate": {
        "engine": "policy.init_args.engine",
        "weights": "policy.init_args.weights",
        "max_pixels": "policy.init_args.family.init_args.max_pixels",
        "test": "data.test",
        "limit": "data.max_eval_rows",
        **_FPS,
        "generations": "sampling.num_generations",
        "max_tokens": "sampling.max_completion_tokens",
        "temperature": "sampling.temperature",
    },
    "cache-features": {**_PARTS, **_FRAMES, "val": "data.val", "test": "data.test"},
    "plan": {**_PARTS, "batch": "data.prompts_per_batch", "generations": "rollout.sampling.num_generations"},
    "serve": {"family": "model.family", **_PIXELS, "max_tokens": "rollout.sampling.max_completion_tokens"},
    "diffusion fit": {
        "family": "model.family",
        "algorithm": "model.algorithm",
        **{name: _FIT[name] for name in _OF_PICTURES},
        "generations": "rollout.sampling.num_generations",
        **_STEPS,
        **_MACHINE,
        **_RUN,
    },
    "diffusion test": {"weights": "model.init_from", "test": "data.test", **_MACHINE, **_RUN},
    "diffusion validate": {"weights": "model.init_from", "val": "data.val", **_MACHINE, **_RUN},
    "demo": {"steps": "max_steps"},
    "export": {"run_dir": "run"},
}
"""Command -> its short names and the options that they stand for; a command's own options are never among them."""


OTHER_COMMANDS = {
    "train": "fit",
    "sft": "fit",
    "grpo": "fit",
    "dpo": "fit",
    "rlhf": "fit",
    "eval": "evaluate",
    "infer": "predict",
    "generate": "predict",
    "deploy": "serve",
}
"""What other tools call commands -> the one here."""


def nearest_command(name: str, commands: Sequence[str]) -> str:
    """The command that a name is meant for; "" where none is near."""
    near = difflib.get_close_matches(name, commands, n=1)
    return OTHER_COMMANDS.get(name) or next(iter(near), "")


def alias_command(args: Sequence[str]) -> str:
    """The command that a command line begins with, as `ALIASES` names it: `diffusion fit` is one."""
    return " ".join(args[:2]) if args[:1] == ["diffusion"] else " ".join(args[:1])


def aliases_of(command: str) -> Mapping[str, str]:
    """Short name -> option of a command; empty of one that has none."""
    return ALIASES.get(command, {})


def without_aliases(args: Sequence[str]) -> list[str]:
    """A command line with the options that its short names stand for.

    They win over config files wherever they stand: names of files go behind the last `--config`, single values to the
    end, for a file would replace them. Of a short name and its long one the later counts.

    Args:
        args: the command and its options.

    Raises:
        ValueError: a short name has no value.
    """
    aliases = aliases_of(alias_command(args))
    short_names = {option: short for short, option in aliases.items()}
    given: dict[str, str] = {}
    kept: list[str] = []
    rest = iter(args)
    for arg in rest:
        name, equals, value = arg.partition("=")
        short = name.removeprefix("--")
        if not name.startswith("--") or short not in aliases:
            given.pop(short_names.get(short, ""), None)
            kept.append(arg)
            continue
        value = value if equals else next(rest, "--")
        if not equals and value.startswith("--"):
            raise ValueError(f"--{short} needs a value behind it; it is short for --{aliases[short]}")
        given[short] = value
    files: list[str] = []
    values: list[str] = []
    for short, option in aliases.items():  # in the order of the table: a family before its weights
        if short in given:
            (files if option in _FILES.values() else values).append(f"--{option}={given[short]}")
    end = _behind_configs(kept)
    return [*kept[:end], *files, *kept[end:], *values]


def _behind_configs(args: Sequence[str]) -> int:
    """The place behind the last config file of a command line, or behind its command."""
    last = max((at for at, arg in enumerate(args) if arg.partition("=")[0] in ("--config", "-c")), default=None)
    if last is None:
        return 2 if args[:1] == ["diffusion"] else 1
    return last + 1 if "=" in args[last] else last + 2
