"""`EnvironmentRunner`: runs environments beside the engine, renders what they answer and has its media encoded."""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from longrl.environments.environment import Environment, Observation, ToolResponse
from longrl.environments.settings import EnvironmentSettings
from longrl.environments.trajectory import Answer, Trajectory
from longrl.features.cache import distinct_media
from longrl.io.functions import resolve_function
from longrl.models.base import CausalFamily
from longrl.turns import ToolCall
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
        if key not in self._environments:
            self._environments[key] = self._make(**self.settings.options)
            self._environments[key].reset(trajectory.prompt.row)
        result = self._environments[key].step(trajectory.text)
        if result is None:
            return None
        if isinstance(result, str):
            result = Observation((ToolResponse((result,), ToolCall("")),))
        responses = [response.content for response in result.responses]
        calls = tuple(response.call for response in result.responses)
        observed = self.family.observation(responses, ended=True, calls=calls)
        frames = [part for content in responses for part in content if not isinstance(part, str)]
        media = [replace(item, source=shown.source) for item, shown in zip(observed.media, frames, strict=True)]
        observed = replace(observed, media=tuple(media))
        with self._encoding, torch.no_grad():
            for item in distinct_media([observed]):
                if item.key not in features:
                    (features[item.key],) = self.family.encode_media(model, [item])
        return observed
