"""Trajectories of several turns that an engine of vLLM has sampled, against the trainer."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

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


def turn_gap(family, model, groups, features) -> float:
    """The largest difference between the engine's log-probs and the trainer's, over all sampled tokens."""
    completions = [[trajectory.completion() for trajectory in group] for group in groups]
    said = torch.cat([one.logprobs for group in completions for one in group])
    (packed,) = pack([group[0].prompt for group in groups], completions, 1 << 30)
    with torch.no_grad():
        logp = family.forward(model, packed, features, 1.0).logp
    return float((said - logp).abs().max())


def outcome(groups):
    return [
        [(trajectory.completion().token_ids.tolist(), len(trajectory.turns)) for trajectory in group]
        for group in groups
    ]
