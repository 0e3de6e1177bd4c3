"""`EnvironmentRunner`: runs environments beside the engine, renders what they answer and has its media encoded."""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from longrl.environments.environment import Environment
from longrl.environments.rendering import as_observation, render_observation
from longrl.environments.settings import EnvironmentSettings
from longrl.environments.trajectory import Answer, Trajectory
from longrl.features.cache import distinct_media, patched_parts
from longrl.io.functions import resolve_function
from longrl.models.base import CausalFamily
from longrl.types import Observed


class EnvironmentRunner:
    """The environments of a rank's rollouts.

    Args:
        settings: which environment, and its limits.
        family: renders what it answers.
    """

    def __init__(self, settings: EnvironmentSettings, family: CausalFamily) -> None:
        self.settings = settings
        self.family = family
        self._make = resolve_function(settings.make, "rollout.environment.make", classes=True)
        self._threads = ThreadPoolExecutor(settings.num_workers)
        self._environments: dict[int, Environment] = {}
        self._encoding = threading.Lock()

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Schemas of the environment's tools, for chat templates."""
        return self._make(**self.settings.options).tools

    def answers(self, model: nn.Module, features: MutableMapping[str, Tensor]) -> Answer:
        """Asks environments for a rollout; what they show goes through the encoder once, into `features`."""

        def answer(trajectory: Trajectory) -> Future[Observed | None]:
            return self._threads.submit(self._step, trajectory, model, features)

        return answer

    def close(self) -> None:
        """Ends what environments run in."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _step(self, trajectory: Trajectory, model: nn.Module, features: MutableMapping[str, Tensor]) -> Observed | None:
        key = id(trajectory)
        if trajectory.num_policy_turns == 1:  # an id comes again once another trajectory is gone
            self._environments[key] = self._make(**self.settings.options)
            self._environments[key].reset(trajectory.prompt.row)
        result = self._environments[key].step(trajectory.text)
        if result is None:
            return None
        tokens_left = self.settings.max_observed_tokens - trajectory.num_observed
        observed = render_observation(self.family, as_observation(result), True, tokens_left)
        if observed is None:
            return None
        with self._encoding, torch.no_grad():
            for item in distinct_media([observed]):
                if item.key not in features:
                    parts = patched_parts(self.family, item) if not len(item.patches) else [item]
                    rows = [self.family.encode_media(model, [part])[0] for part in parts]
                    features[item.key] = torch.cat(rows)
        return observed
