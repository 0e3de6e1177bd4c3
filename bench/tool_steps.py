"""Seconds of a step whose completions are shown crops, against steps of as many tokens without tools.

A small model with random weights samples P groups of G completions and takes the gradient of their log-probabilities.
Turns end at one of some tokens that the model draws once in `TURN_TOKENS`; every turn but the last is answered with a
crop of the prompt's video, decoded by `VideoTools` in its processes and encoded. The others sample one turn:

- same_tokens: of as many tokens as the first ones have in all, sampled and shown.
- same_sampled: of as many as the first ones sample.

All three take turns; the median of each is reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import Row
from torch import Tensor

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.engines.hf import HFEngine
from longrl.environments.environment import Observation
from longrl.environments.runner import EnvironmentRunner
from longrl.environments.settings import EnvironmentSettings
from longrl.environments.video_tools import VideoTools
from longrl.features.cache import FeatureCache
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.testing.needles import SCENE_S, TOOLS
from longrl.testing.tool_traces import crop_call
from longrl.types import Completion, Prompt, SamplingParams

NUM_GENERATIONS = 8
TURN_TOKENS = 32
MAX_TOKENS = 96
MAX_TURNS = 3
PIXELS = 3136


class AlwaysCrops(VideoTools):
    """Answers every turn, whatever it says, with the next scene."""

    def step(self, text: str) -> Observation:
        """See `Environment.step`."""
        self.scene = (getattr(self, "scene", -1) + 1) % 4
        answer = super().step(crop_call(self.scene * SCENE_S, (self.scene + 1) * SCENE_S))
        assert isinstance(answer, Observation)
        return answer


@dataclass
class Case:
    """A model, prompts and what a step needs."""

    family: Qwen2_5_VLFamily
    model: Any
    prompts: list[Prompt]
    environment: EnvironmentRunner

    def with_tools(self, seed: int) -> tuple[list[list[Completion]], dict[str, Tensor]]:
        """Completions of several turns, and the features of all that they were shown."""
        sampling = SamplingParams(NUM_GENERATIONS, MAX_TOKENS)
        features = FeatureCache(self.family).get_or_encode(self.model, self.prompts)
        groups = self.environment.begin(self.prompts, sampling)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for group in groups:
            for trajectory in group:
                trajectory.stop_token_ids = tuple(range(0, vocabulary, TURN_TOKENS))
        answer = self.environment.answers(self.model, features)
        HFEngine().generate_turns(self.family, self.model, groups, features, sampling, seed, answer)
        return [[trajectory.completion() for trajectory in group] for group in groups], features

    def without_tools(self, seed: int, num_tokens: int) -> tuple[list[list[Completion]], dict[str, Tensor]]:
        """Completions of one turn."""
        features = FeatureCache(self.family).get_or_encode(self.model, self.prompts)
        sampling = SamplingParams(NUM_GENERATIONS, num_tokens)
        return HFEngine().generate(self.family, self.model, self.prompts, features, sampling, seed), features

    def update(self, completions: list[list[Completion]], features: dict[str, Tensor]) -> None:
        """The gradient of all log-probabilities."""
        for packed in pack(self.prompts, completions, max_tokens=1 << 14):
            self.family.forward(self.model, packed, features).logp.sum().backward()
        self.model.zero_grad()


def step_rows(folder: Path, num_prompts: int, repeats: int) -> list[Row]:
    """The three kinds of step, with their medians and the first one's ratio to the others.

    Args:
        folder: with `base` and `data`, as `bench/tools.py` makes them.
        num_prompts: P.
        repeats: steps of each kind.
    """
    case = make_case(folder, num_prompts)
    try:
        completions, _ = case.with_tools(0)  # also starts the environment's processes
        flat = [completion for group in completions for completion in group]
        sampled = round(statistics.fmean(completion.num_sampled for completion in flat))
        total = round(statistics.fmean(len(completion.token_ids) for completion in flat))
        kinds: dict[str, tuple[int, Callable[[int], tuple[list[list[Completion]], dict[str, Tensor]]]]] = {
            "tools": (total, case.with_tools),
            "same_tokens": (total, lambda seed: case.without_tools(seed, total)),
            "same_sampled": (sampled, lambda seed: case.without_tools(seed, sampled)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        for repeat in range(repeats):
            for name, (_, sample) in kinds.items():
                start = time.perf_counter()
                case.update(*sample(repeat))
                seconds[name].append(time.perf_counter() - start)
    finally:
        case.environment.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "step": name,
            "tokens_per_completion": tokens,
            "seconds": round(medians[name], 3),
            "tools_to_this": round(medians["tools"] / medians[name], 3),
        }
        for name, (tokens, _) in kinds.items()
    ]


def make_case(folder: Path, num_prompts: int) -> Case:
    """The bench's base model and prompts of its data."""
    family = Qwen2_5_VLFamily(str(folder / "base"), min_pixels=PIXELS, max_pixels=PIXELS, random_init=True)
    video = VideoSampling(fps=0.5)
    data = LongVideoReason(family, train=folder / "data" / "train.jsonl", video=video, prompts_per_batch=num_prompts)
    data.setup("fit")
    prompts = [data.datasets["train"][number] for number in range(num_prompts)]
    settings = EnvironmentSettings(AlwaysCrops, TOOLS, max_turns=MAX_TURNS, max_observed_tokens=512)
    return Case(family, family.build(), prompts, EnvironmentRunner(settings, family))
