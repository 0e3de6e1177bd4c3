"""Completions of several turns by vLLM: each turn is a request of its own, and its prompt is all that came before.

vLLM's prefix cache has most of it. No turn waits for another: as soon as a trajectory is answered, its next request
goes out, and vLLM puts it beside those that it is working on.

Letters: T tokens of the prompt, S of the trajectory so far.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longrl.engines.rollout_engine import prompt_seed
from longrl.engines.turn_requests import TurnRequests
from longrl.engines.vllm_options import make_completion, sampling_arguments
from longrl.environments.trajectory import Answer, Trajectory
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.models.engine_adapter import EngineAdapter
from longrl.types import Observed, Prompt, SamplingParams

logger = logging.getLogger(__name__)

SAMPLED_PLACEHOLDERS = "sampled_placeholders"
"""Key of a request: [[index, token], ...] of placeholder tokens that the policy sampled and no media item stands at."""


@dataclass
class TurnSampler:
    """The turns of a rollout's trajectories, each as soon as what it needs is there."""

    family: CausalFamily
    features: Mapping[str, Tensor]
    """media key -> [N, D]; gets those of answers meanwhile."""
    sampling: SamplingParams
    seed: int
    requests: TurnRequests
    answer: Answer
    limit: int
    """Tokens of prompt and completion together that the engine takes."""
    option: str
    """That sets the limit."""
    num_without_room: int = 0
    """Trajectories that ended because what they were to be shown is above the limit."""

    def sample(self, groups: Sequence[Sequence[Trajectory]]) -> None:
        """Samples trajectories to their ends; those of a prompt lie side by side."""
        # 1. All go on where they are: most have no turn, one that was saved may be waiting for its answer.
        asked: dict[Future[Observed | None], Trajectory] = {}
        num_sampling = 0
        for group in groups:
            first: dict[str, Any] = {}  # the request of all first turns, whose features are large
            for trajectory in group:
                if trajectory.finish_reason is not None:
                    continue
                if trajectory.turns and trajectory.turns[-1].role == "assistant":
                    asked[self.answer(trajectory)] = trajectory
                    continue
                if trajectory.turns:
                    self._request_turn(trajectory)
                else:
                    first = first or turn_request(self.family, trajectory, self.features)
                    self._request_turn(trajectory, first)
                num_sampling += 1

        # 2. What has ended is answered, what was answered is sampled on.
        while num_sampling or asked:
            PULSE.beats += 1
            for trajectory, output in self.requests.finished(asked):
                num_sampling -= 1
                if take_turn(self.family, trajectory, output, self.limit):
                    asked[self.answer(trajectory)] = trajectory
            for future in [future for future in asked if future.done()]:
                trajectory = asked.pop(future)
                self.num_without_room += not take_answer(trajectory, future.result(), self.limit)
                if trajectory.finish_reason is None:
                    self._request_turn(trajectory)
                    num_sampling += 1
        warn_without_room(self.num_without_room, self.limit, self.option)

    def _request_turn(self, trajectory: Trajectory, request: dict[str, Any] | None = None) -> None:
        request = request or turn_request(self.family, trajectory, self.features)
        params = turn_arguments(self.family, trajectory, self.sampling, self.seed, self.limit)
        self.requests.add(trajectory, request, params)


def take_turn(family: EngineAdapter, trajectory: Trajectory, output: Mapping[str, Any], limit: int) -> bool:
    """Adds what an engine has sampled of a trajectory's turn.

    Args:
        family: of the model.
        trajectory: whose turn it is.
        output: as `TurnRequests.finished` gives it; of a turn that was cut the tokens so far.
        limit: tokens of prompt and completion together that the engine takes.

    Returns:
        True if the environment is to be asked. If not, and it has not ended, what a cut has left is to be sampled.
    """
    turn = make_completion(family, output)
    ids, version = turn.token_ids, output.get("version")
    room = min(trajectory.tokens_left, limit - num_tokens_of(trajectory)) - len(ids)
    if output["finish_reason"] == "cut" and room > 0:
        if len(ids):
            trajectory.add_part(ids, turn.logprobs, version)
        return False
    text = turn.text
    if trajectory.num_open_tokens:
        text = family.decode(torch.cat([trajectory.turn_ids, ids]))
    return trajectory.add_turn(ids, turn.logprobs, text, turn.finish_reason == "stop", version)


def take_answer(trajectory: Trajectory, observed: Observed | None, limit: int) -> bool:
    """Adds what a trajectory was answered; False if that would leave no room for a token, which ends it."""
    if observed is not None and num_tokens_of(trajectory) + len(observed.input_ids) >= limit:
        trajectory.finish_reason = "length"
        return False
    trajectory.add_observed(observed)
    return True


def warn_without_room(count: int, limit: int, option: str) -> None:
    """Tells of trajectories that ended because what they were to be shown is above the limit."""
    if count:
        logger.warning(
            "%d completions ended early: with what they were to be shown they leave no room in %d, the %s; raise "
            "that, or lower rollout.environment.max_observed_tokens",
            *(count, limit, option),
        )


def num_tokens_of(trajectory: Trajectory) -> int:
    """T + S."""
    return len(trajectory.prompt.input_ids) + trajectory.num_sampled + trajectory.num_observed


def turn_seed(seed: int, trajectory: Trajectory) -> int:
    """What a trajectory's next turn is drawn by.

    A first turn is drawn as the completion of its number by `generate`, later ones, and what follows a cut, by a seed
    of their own: the numbers that drew the tokens before a cut must not draw those behind it once more.
    """
    turn = trajectory.num_policy_turns
    prompt_id = trajectory.prompt.id
    cuts = f", cut {trajectory.num_cuts}" if trajectory.num_cuts else ""
    if turn == 0 and not cuts:
        return prompt_seed(seed, prompt_id) % (1 << 31) + trajectory.number
    return prompt_seed(seed, f"{prompt_id} (completion {trajectory.number}, turn {turn}{cuts})") % (1 << 31)


def turn_arguments(
    family: EngineAdapter, trajectory: Trajectory, sampling: SamplingParams, seed: int, limit: int
) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` for a trajectory's next turn, or for what a cut has left of one.

    Args:
        family: of the model.
        trajectory: so far.
        sampling: of every turn.
        seed: of the rollout.
        limit: tokens of prompt and completion together that the engine takes.
    """
    one = replace(sampling, num_generations=1)
    arguments = sampling_arguments(family, trajectory.prompt, one, seed, trajectory.number)
    arguments["max_tokens"] = min(trajectory.tokens_left, limit - num_tokens_of(trajectory))
    arguments["stop_token_ids"] += [token for token in trajectory.stop_token_ids if token not in family.end_token_ids]
    if arguments["seed"] is not None:
        arguments["seed"] = turn_seed(seed, trajectory)
    return arguments


def turn_request(family: EngineAdapter, trajectory: Trajectory, features: Mapping[str, Tensor]) -> dict[str, Any]:
    """Prompt and all tokens so far as vLLM takes them.

    A placeholder token that the policy has sampled is a token as any other. vLLM puts media where it finds
    placeholders, the first ones first, so such a token is given as another one until that is done (`render_request`).
    """
    return request_of(family, trajectory.so_far(), trajectory.sampled_mask, features)


def request_of(
    family: EngineAdapter, prompt: Prompt, sampled_mask: Tensor, features: Mapping[str, Tensor]
) -> dict[str, Any]:
    """A prompt as vLLM takes it that ends in what a policy sampled and was shown.

    Args:
        family: of the model.
        prompt: with all tokens so far.
        sampled_mask: [S] of the last ones, True where a token was sampled.
        features: of all media.
    """
    in_prompt = torch.zeros(len(prompt.input_ids) - len(sampled_mask), dtype=torch.bool)
    sampled = torch.cat([in_prompt, sampled_mask])  # [T + S]
    placeholders = torch.tensor(list(family.media_token_ids().values()), dtype=torch.int64)
    hidden = sampled & torch.isin(prompt.input_ids, placeholders)  # [T + S]
    if not hidden.any():
        return family.engine_request(prompt, features)
    plain = replace(prompt, input_ids=prompt.input_ids.masked_fill(hidden, family.end_token_ids[0]))
    indices = hidden.nonzero()[:, 0]
    pairs = torch.stack([indices, prompt.input_ids[indices]], 1).tolist()
    return {**family.engine_request(plain, features), SAMPLED_PLACEHOLDERS: pairs}


def restore_placeholders(rendered: dict[str, Any], pairs: Sequence[Sequence[int]]) -> dict[str, Any]:
    """A request that vLLM has rendered, with the placeholder tokens that `turn_request` gave as others.

    Raises:
        ValueError: the pairs are no indices and tokens of it.
    """
    if not pairs:
        return rendered
    ids = list(rendered["prompt_token_ids"])
    try:
        restored = {int(index): int(token) for index, token in pairs}
    except (TypeError, ValueError):
        restored = {-1: -1}
    if any(token < 0 or not 0 <= index < len(ids) for index, token in restored.items()):
        raise ValueError(f"{SAMPLED_PLACEHOLDERS} must be [[index, token], ...] of a prompt of {len(ids)} tokens")
    for index, token in restored.items():
        ids[index] = token
    return {**rendered, "prompt_token_ids": ids}
