"""Trajectories of several turns that an engine of vLLM has sampled, against the trainer."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from longrl.environments.trajectory import Trajectory, begin
from longrl.features.cache import distinct_media
from longrl.packing.pack import pack
from longrl.types import Observed, SamplingParams
from tests.tiny import frames

SAMPLING = SamplingParams(3, 40)


class Answers:
    """An environment that answers a trajectory as often as `count` says: with a crop, then by two tools at once."""

    def __init__(self, family, model, features, count=lambda trajectory: trajectory.number):
        self.family = family
        self.model = model
        self.features = features
        self.count = count
        self.threads = ThreadPoolExecutor(4)
        self.order: list[tuple[str, int]] = []
        """Prompt and number of each turn, as it was asked about."""

    def __call__(self, trajectory: Trajectory) -> Future[Observed | None]:
        self.order.append((trajectory.prompt.id, trajectory.number))
        return self.threads.submit(self.answered, trajectory)

    def answered(self, trajectory: Trajectory) -> Observed | None:
        turn = trajectory.num_policy_turns
        if turn > self.count(trajectory):
            return None
        crop = frames(4 + 2 * trajectory.number, 60, 60, f"crop {trajectory.number}")
        shows = [crop] if self.family.media_token_ids() else ["a word"]
        responses = [["seen: ", *shows], ["and a frame", frames(1, 40, 40, "zoomed", "image")]] if turn > 1 else [shows]
        if not self.family.media_token_ids():
            responses = [[part for part in response if isinstance(part, str)] for response in responses]
        observed = self.family.observation(responses, ended=True)
        with torch.no_grad():
            for item in distinct_media([observed]):
                if item.key not in self.features:
                    (self.features[item.key],) = self.family.encode_media(self.model, [item])
        return observed


def often_ending(family, prompts, sampling=SAMPLING, first=0, among=8) -> list[list[Trajectory]]:
    """Trajectories whose turns end with every `among`-th token of the vocabulary: random weights seldom end one."""
    groups = begin(prompts, sampling, max_turns=4, first=first)
    media = set(family.media_token_ids().values())
    for trajectory in (one for group in groups for one in group):
        vocabulary = range(family.config.get_text_config().vocab_size)
        trajectory.stop_token_ids = tuple(token for token in vocabulary if token % among == 0 and token not in media)
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
    (packed,) = pack([group[0].prompt for group in groups], completions, 1 << 30)
    with torch.no_grad():
        scored = family.forward(model, packed, features, 1.0).logp
    every = [one for group in completions for one in group]
    pairs = zip(every, scored.split([one.num_sampled for one in every]), strict=True)
    return max(float((one.logprobs - own)[num_given:].abs().max()) for one, own in pairs)


def outcome(groups) -> list[list[tuple[list[int], int]]]:
    """Token ids and turns of each completion."""
    completions = [[trajectory.completion() for trajectory in group] for group in groups]
    return [[(one.token_ids.tolist(), len(one.turns)) for one in group] for group in completions]
