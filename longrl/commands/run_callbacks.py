"""Which callbacks a run has beside those of its config, and whether one of them rolls out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar as BaseProgressBar

from longrl.callbacks.run_watch import RunWatch
from longrl.callbacks.terminal_view import TerminalView
from longrl.callbacks.timeline import Timeline

logger = logging.getLogger(__name__)

View = Literal["auto", "live", "plain", "off"]


def find_view(callbacks: Sequence[Callback], mode: View) -> list[Callback]:
    """What shows how far a command is; none if nothing is to be shown, or the config has such a thing.

    Args:
        callbacks: of the config.
        mode: of `--view`.
    """
    is_listed = any(isinstance(one, BaseProgressBar) for one in callbacks)
    return [] if mode == "off" or is_listed else [TerminalView(mode)]


def with_watch(callbacks: Sequence[Callback]) -> list[Callback]:
    """The callbacks of a training run with those that look on, which come behind all that logs.

    Checkpoints hold what the watch knows; Lightning saves them behind all other callbacks.
    """
    listed = [one for one in callbacks if isinstance(one, RunWatch)]
    others = [one for one in callbacks if not isinstance(one, RunWatch)]
    timeline = [] if any(isinstance(one, Timeline) for one in callbacks) else [Timeline()]
    return [*others, *timeline, *(listed or [RunWatch()])]


def check_rollouts(
    listed: Sequence[Callback],
    rollout: Callback | None,
    rollout_class: type[Callback],
    *,
    needs_one: bool,
    given: Mapping[str, Any],
) -> None:
    """Compares what rolls out with what the run needs, before weights are loaded.

    Args:
        listed: `trainer.callbacks`; one may be a rollout callback of the user's own.
        rollout: of the group `rollout`; None without a reward.
        rollout_class: the class that the group configures.
        needs_one: of RL.
        given: options of the group.

    Raises:
        ValueError: two would roll out, or nothing does in RL.
    """
    others = [type(callback).__name__ for callback in listed if isinstance(callback, rollout_class)]
    if others and rollout is not None:
        raise ValueError(f"trainer.callbacks has {others[0]} beside the callback of rollout.reward; leave one out")
    if others or rollout is not None:
        return
    if needs_one:
        hint = _hint(listed, rollout_class)
        raise ValueError(f"RL needs rollout.reward, which is not set; name one by --rollout.reward FILE.yaml{hint}")
    defaults = inspect.signature(rollout_class).parameters
    unused = [name for name in given if name != "reward" and given[name] != defaults[name].default]
    if unused:
        logger.warning("without rollout.reward these have no effect: rollout.%s", ", rollout.".join(unused))


def _hint(listed: Sequence[Callback], rollout_class: type[Callback]) -> str:
    """What is said of a user's own callbacks, which may be meant to roll out; "" without any."""
    own = [type(one).__name__ for one in listed if not type(one).__module__.startswith(("longrl.", "lightning."))]
    if not own:
        return ""
    return (
        f". If {', '.join(own)} of trainer.callbacks is to roll out, make it a subclass of "
        f"{rollout_class.__module__}.{rollout_class.__name__}: no other callback is taken for one"
    )
