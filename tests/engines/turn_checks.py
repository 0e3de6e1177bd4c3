"""Trajectories of several turns that an engine of vLLM has sampled, against the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from longrl.environments.trajectory import Trajectory, begin
from longrl.types import SamplingParams
from tests.tiny import frames
from tests.turns import Script, ScriptedAnswers, every_nth_token, trainer_logprobs

SAMPLING = SamplingParams(3, 96)


def crops(family, count: Callable[[Trajectory], int] = lambda trajectory: trajectory.number) -> Script:
    """Answers a trajectory as often as `count` says: first with a crop, then by two tools in one turn."""

    def script(trajectory):
        turn = trajectory.num_policy_turns
        if turn > count(trajectory):
            return None
        crop = frames(4 + 2 * trajectory.number, 60, 60, f"crop {trajectory.number}")
        responses = [[crop]] if turn == 1 else [["seen: ", crop], ["a frame", frames(1, 40, 40, "zoomed", "image")]]
        if family.media_token_ids():
            return responses
        return [[part if isinstance(part, str) else "a word" for part in response] for response in responses]

    return script


def answers(family, model, features, script: Script | None = None) -> ScriptedAnswers:
    """By `crops`, or by another script."""
    return ScriptedAnswers(family, model, features, script or crops(family))


def often_ending(family, prompts, sampling=SAMPLING, first=0, among=8) -> list[list[Trajectory]]:
    """Trajectories whose turns end with every `among`-th token of the vocabulary: random weights seldom end one."""
    groups = begin(prompts, sampling, max_turns=4, first=first)
    for trajectory in (one for group in groups for one in group):
        trajectory.stop_token_ids = every_nth_token(family, among)
    return groups


def with_sampled_placeholders(family, prompt, sampling=SAMPLING) -> Trajectory:
    """A trajectory whose first turn has placeholder tokens, as if by chance; a crop was shown behind it."""
    ((trajectory,),) = often_ending(family, [prompt], replace(sampling, num_generations=1))
    plain = family.end_token_ids[0] + 1
    ids = torch.tensor([plain, *family.media_token_ids().values(), plain, family.end_token_ids[0]])
    assert trajectory.add_turn(ids, torch.zeros(len(ids)), "by chance", stopped=True)
    return trajectory


def turn_gap(family, model, groups, features, num_given=0) -> float:
    """The largest difference between the engine's log-probs and the trainer's, over all sampled tokens.

    Args:
        family: of the model.
        model: the trainer's.
        groups: trajectories that have ended.
        features: of all that they show.
        num_given: tokens of each that no engine has sampled.
    """
    completions = [[trajectory.completion() for trajectory in group] for group in groups]
    prompts = [group[0].prompt for group in groups]
    scored = trainer_logprobs(family, model, prompts, completions, features)
    every = [one for group in completions for one in group]
    pairs = zip(every, scored.split([one.num_sampled for one in every]), strict=True)
    return max(float((one.logprobs - own)[num_given:].abs().max()) for one, own in pairs)


def outcome(groups) -> list[list[tuple[list[int], int]]]:
    """Token ids and turns of each completion."""
    completions = [[trajectory.completion() for trajectory in group] for group in groups]
    return [[(one.token_ids.tolist(), len(one.turns)) for one in group] for group in completions]
