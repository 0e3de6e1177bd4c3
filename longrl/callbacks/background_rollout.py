"""A rollout beside the update: an engine in another process generates while the trainer computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from longrl.engines.rollout_engine import GeneratedShards, RolloutRequest
from longrl.features.rollout_features import RolloutFeatures
from longrl.modules.policy import PolicyModule


@dataclass(frozen=True)
class BackgroundRollout:
    """A rollout under way."""

    module: PolicyModule
    request: RolloutRequest
    features: RolloutFeatures
    """Of its prompts; an environment's are added meanwhile."""
    generated: Future[list[GeneratedShards]]
    """Result of `generate_shards`, once there."""

    def __post_init__(self) -> None:
        rollouts = self.module.phases.spans.rollouts
        rollouts.note(1)
        self.generated.add_done_callback(lambda _: rollouts.note(0))


def run_in_background(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Calls a function in a thread that does not keep a process alive which ends for another reason."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
