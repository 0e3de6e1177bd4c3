"""Old names of what configs, run folders and command lines hold, understood for one release with a warning.

Edit the tables here when a class, function or option that a user's YAML may name gets another name.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

PATHS = {
    "longrl.algorithms.corrections": "longrl.algorithms",
    "longrl.algorithms.guarded": "longrl.algorithms.grpo_guard",
    "longrl.algorithms.kl": "longrl.algorithms",
    "longrl.algorithms.selection": "longrl.algorithms",
    "longrl.algorithms.surrogates": "longrl.algorithms",
    "longrl.algorithms.token_weights": "longrl.algorithms",
    "longrl.algorithms.tokens": "longrl.algorithms",
    "longrl.callbacks.flow_rollout.FlowRolloutCallback": "longrl.diffusion.rollout_callback.DiffusionRolloutCallback",
    "longrl.callbacks.pictures.Pictures": "longrl.diffusion.picture_grids.PictureGrids",
    "longrl.datamodules.prompt_rows": "longrl.diffusion.prompt_rows",
    "longrl.datamodules.published": "longrl.datamodules.rows",
    "longrl.evaluation.endpoint": "longrl.evaluation.endpoint_policy",
    "longrl.evaluation.local": "longrl.evaluation.local_policy",
    "longrl.flow.steps": "longrl.diffusion.steps",
    "longrl.flow.windows": "longrl.diffusion.windows",
    "longrl.models.sd3": "longrl.diffusion.sd3",
    "longrl.models.wan": "longrl.diffusion.wan",
    "longrl.rewards.answer_text": "longrl.rewards.answers",
    "longrl.rewards.choice": "longrl.rewards.answers",
    "longrl.rewards.clip": "longrl.diffusion.rewards.clip",
    "longrl.rewards.colour": "longrl.diffusion.rewards.colour",
    "longrl.rewards.generation": "longrl.diffusion.rewards.generation",
    "longrl.rewards.ocr": "longrl.diffusion.rewards.ocr",
    "longrl.rewards.quality": "longrl.diffusion.rewards.quality",
    "longrl.rewards.tasks": "longrl.rewards.reward_sum",
    "longrl.rollout.engine": "longrl.engines.hf",
    "longrl.rollout.vllm_engine": "longrl.engines.vllm",
    "longrl.rollout.vllm_server": "longrl.engines.server",
}
"""Import paths of modules, classes and functions: old to new. A module's entry counts for all that it defines."""

OPTIONS = {
    "freeze_tower": "freeze_vision_encoder",
    "max_gap": "max_mismatch",
    "max_mean_gap": "max_mean_mismatch",
    "max_refills": "max_resample_rounds",
    "trust_engine_below": "bypass_old_logp_below",
}
"""Keys of configs and components of flags: old to new."""

ROLLOUT_OPTIONS = frozenset(
    ("reward", "sampling", "eval_sampling", "engine", "max_resample_rounds", "seed", "max_mismatch",
     "max_mean_mismatch", "bypass_old_logp_below", "overlap", "samples_per_batch")
)  # fmt: skip
"""What flags once set by `--trainer.callbacks.init_args.X`, as options of the last callback."""


def current_names(value: Any) -> Any:
    """Replaces old import paths and option names in what a YAML text holds.

    Args:
        value: a mapping, list or scalar, with any of these inside.
    """
    if isinstance(value, dict):
        return {_current_option(key): current_names(item) for key, item in value.items()}
    if isinstance(value, list):
        return [current_names(item) for item in value]
    return _current_path(value) if isinstance(value, str) else value


def current_arguments(args: Sequence[str]) -> list[str]:
    """Replaces old import paths and option names in a command line.

    Raises:
        ValueError: a flag sets an option of the rollout callback by its position among `trainer.callbacks`.
    """
    current = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            name = ".".join(_current_option(part) for part in name.split("."))
            _refuse_position(name)
        else:
            name = _current_path(name)
        current.append(f"{name}{equals}{_current_path(value)}")
    return current


def _refuse_position(flag: str) -> None:
    before, found, option = flag.partition("--trainer.callbacks.init_args.")
    if found and not before and option.partition(".")[0] in ROLLOUT_OPTIONS:
        raise ValueError(f"trainer.callbacks.init_args.{option} is now rollout.{option}; write --rollout.{option}")


def _current_option(name: Any) -> Any:
    if name in OPTIONS:
        _warn_once(name, OPTIONS[name])
    return OPTIONS.get(name, name)


def _current_path(text: str) -> str:
    if not text.startswith("longrl."):
        return text
    module, _, name = text.rpartition(".")
    new = PATHS.get(text) or (f"{PATHS[module]}.{name}" if module in PATHS else text)
    if new != text:
        _warn_once(text, new)
    return new


@cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("%s is now %s; the old name works for one release", old, new)
