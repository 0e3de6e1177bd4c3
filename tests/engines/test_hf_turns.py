"""Completions of several turns by `HFEngine`: exact, seeded, and none waits for another's tools."""

from __future__ import annotations

import pytest
import torch

from longrl.engines.hf import HFEngine
from longrl.types import SamplingParams
from tests.families import FAMILIES
from tests.tiny import frames
from tests.turns import every_nth_token, sample_turns, trainer_logprobs

SAMPLING = SamplingParams(num_generations=4, max_completion_tokens=24)


def crops(trajectory):
    """No answer, one, two or three; texts, a crop, an image and a crop of two tools in one turn."""
    number = len(trajectory.turns) // 2
    if number >= trajectory.number % 4:
        return None
    kinds = trajectory.prompt.row.metadata.get("kinds", ("image", "video"))
    name = f"{trajectory.prompt.id} {trajectory.number} {number}"
    crop = frames(3 + 2 * number, 60, 90, f"crop {name}")
    zoom = frames(1, 40, 70, f"zoom {name}", "image")
    if not kinds:
        return [[f"It is {name}."]] * (1 + number)
    if number == 1:
        return [["Here: ", crop], [zoom, " is it."]]
    return [[crop, f" of {name}"]]


def given(name):
    family = FAMILIES[name].make()
    model = family.build()
    return family, model, FAMILIES[name].prompts(family)


def flat(groups):
    return [completion for group in groups for completion in group]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "nvila", "internvl3.5"])
def test_logprobs_are_the_trainers_after_every_turn(name):
    family, model, prompts = given(name)
    for prompt in prompts:
        prompt.row.metadata["kinds"] = tuple(family.media_token_ids())
    stops = every_nth_token(family, 5)
    groups, features = sample_turns(HFEngine(), family, model, prompts, SAMPLING, crops, stop_token_ids=stops)
    found = torch.cat([completion.logprobs for completion in flat(groups)])
    wanted = trainer_logprobs(family, model, prompts, groups, features)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
