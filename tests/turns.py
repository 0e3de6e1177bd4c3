"""Answers to the turns of tiny models: scripted, rendered and encoded on threads as those of environments."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from longrl.engines.rollout_engine import RolloutEngine
from longrl.environments.trajectory import Trajectory, begin
from longrl.features.cache import FeatureCache
from longrl.models.base import CausalFamily
from longrl.packing.pack import pack
from longrl.types import Completion, Features, Frames, Observed, Prompt, SamplingParams

Responses = Sequence[Sequence[str | Frames]]
"""Texts and media of each tool's answer to a turn."""
Script = Callable[[Trajectory], Responses | None]
"""What a trajectory whose turn has ended is answered; None ends it."""


class ScriptedAnswers:
    """`Answer` by a script.

    Args:
        family: renders.
        model: encodes.
        features: of the prompts; gets those of what is shown.
        script: says what is shown.
        delay: seconds that an answer takes at most, at random.
    """

    def __init__(
        self,
        family: CausalFamily,
        model: Any,
        features: MutableMapping[str, Tensor],
        script: Script,
        delay: float = 0.0,
    ) -> None:
        self.family = family
        self.model = model
        self.features = features
        self.script = script
        self.delay = delay
        self.threads = ThreadPoolExecutor(4)

    def __call__(self, trajectory: Trajectory) -> Future[Observed | None]:
        return self.threads.submit(self._answer, trajectory)

    @torch.no_grad()
    def _answer(self, trajectory: Trajectory) -> Observed | None:
        time.sleep(random.uniform(0, self.delay))
        responses = self.script(trajectory)
        if responses is None:
            return None
        ended = int(trajectory.turn_ids[-1]) in self.family.end_token_ids
        observed = self.family.observation(responses, ended=ended)
        for item in observed.media:
            if item.key not in self.features:
                (self.features[item.key],) = self.family.encode_media(self.model, [item])
        return observed


def every_nth_token(family: CausalFamily, n: int) -> tuple[int, ...]:
    """Tokens that end turns of a random model, which hardly ever says an end token."""
    return tuple(range(0, len(family.tokenizer), n))


def sample_turns(
    engine: RolloutEngine,
    family: CausalFamily,
    model: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    script: Script,
    *,
    seed: int = 1,
    max_turns: int = 4,
    stop_token_ids: tuple[int, ...] = (),
    max_observed_tokens: int = 0,
    delay: float = 0.0,
) -> tuple[list[list[Completion]], Features]:
    """Completions of each prompt, and the features of all that they show."""
    features = dict(FeatureCache(family).get_or_encode(model, prompts))
    groups = begin(prompts, sampling, max_turns)
    for group in groups:
        for trajectory in group:
            trajectory.stop_token_ids = stop_token_ids
            trajectory.max_observed_tokens = max_observed_tokens
    answers = ScriptedAnswers(family, model, features, script, delay)
    with answers.threads:
        engine.generate_turns(family, model, groups, features, sampling, seed, answers)
    return [[trajectory.completion() for trajectory in group] for group in groups], features


@torch.no_grad()
def trainer_logprobs(
    family: CausalFamily,
    model: Any,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    features: Features,
    temperature: float = 1.0,
) -> Tensor:
    """[all sampled tokens] as the trainer scores them."""
    (packed,) = pack(prompts, groups, 1 << 30)
    return family.forward(model, packed, features, temperature).logp
