"""From prompts to scored groups: encode, hand over weights, generate this rank's share, reward, join with the team."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from longrl.engines.generation_shards import GenerationShard, gather_groups, generation_shards
from longrl.engines.parity import Mismatch, check_mismatch, check_rendered_prompts, engine_logps
from longrl.engines.rollout_engine import RolloutEngine
from longrl.models.base import CausalFamily
from longrl.rewards import RewardSum
from longrl.types import Group, Prompt, SamplingParams

if TYPE_CHECKING:
    from longrl.modules.policy import PolicyModule

logger = logging.getLogger(__name__)

PARITY_TOKENS = 8
"""Of each prompt of the first batch, to compare engine and trainer."""

Features = Mapping[str, Tensor]
Unscored = list[list[Group]]
"""For each way of sampling this rank's share of the groups."""


@dataclass(frozen=True)
class Request:
    """What is asked of an engine at once."""

    prompts: Sequence[Prompt]
    """Of the whole team."""
    samplings: tuple[SamplingParams, ...]
    """Ways to sample each prompt; every one gives a list of groups."""
    step: int
    """Optimizer steps done by the weights to sample from."""
    seed: int
    ids: Sequence[str] | None = None
    """That decide each prompt's samples, in place of the prompts' own."""

    def asked(self, place: int) -> Prompt:
        """A prompt as the engine gets it."""
        prompt = self.prompts[place]
        return prompt if self.ids is None else dataclasses.replace(prompt, id=self.ids[place])


class GroupSampler:
    """Asks an engine for completions and has them scored. Every rank of the run must make the same calls.

    Args:
        engine: generates.
        reward: scores.
    """

    def __init__(self, engine: RolloutEngine, reward: RewardSum) -> None:
        self.engine = engine
        self.reward = reward
        self._running: Future[Unscored] | None = None

    def validate(self, policy: PolicyModule) -> None:
        """Raises ValueError if ranks that make up one engine do not have the same prompts."""
        sp_group, ranks = policy.parallel.sp_group.size, self.engine.ranks_per_engine
        if sp_group % ranks:
            raise ValueError(
                f"tensor_parallel_size={ranks} of the engine must divide the {sp_group} ranks that share prompts; set "
                "sequence_parallel_size of MRSPStrategy to a multiple of it, or tensor_parallel_size to 1"
            )

    def sample(self, policy: PolicyModule, request: Request) -> list[list[Group]]:
        """For each way of sampling the groups of all prompts, scored."""
        features = self._prepare(policy, request)
        with policy.phases("generate"), policy.trainer.precision_plugin.forward_context():
            with policy.parallel.world.raise_on_any_rank():
                found = self._in_weights(policy, lambda: self._generate(policy, request, features))
        return self._scored(policy, request, found)

    def begin(self, policy: PolicyModule, request: Request) -> Callable[[], list[list[Group]]]:
        """Starts to generate in the background and returns a function that waits for it and gives what `sample` would.

        For engines that run elsewhere and hold weights of their own.
        """
        features = self._prepare(policy, request)
        running = self._running = in_background(lambda: self._generate(policy, request, features))

        def finish() -> list[list[Group]]:
            with policy.phases("generate"), policy.parallel.world.raise_on_any_rank():
                found = running.result()
            return self._scored(policy, request, found)

        return finish

    def compare(self, policy: PolicyModule, prompts: Sequence[Prompt], step: int, max_mismatch: float) -> None:
        """Raises RuntimeError unless engine and trainer read these prompts alike and score greedy tokens alike.

        Args:
            policy: the trainer's side.
            prompts: of the whole team.
            step: optimizer steps done.
            max_mismatch: largest difference of a log-probability.
        """
        if self.engine.reads_policy_weights:
            return  # it reads the trainer's
        family = policy.engine_family
        greedy = SamplingParams(num_generations=1, max_completion_tokens=PARITY_TOKENS, temperature=0.0)
        features = self._prepare(policy, Request(prompts, (greedy,), step, seed=0))
        check_rendered_prompts(prompts, self.engine.rendered_prompts(family, prompts, features), features)
        with policy.parallel.world.raise_on_any_rank():
            found = self.engine.generate(family, policy.model, prompts, features, greedy, seed=0)
        self.engine.sleep()
        tokens = [[completion.token_ids for completion in own] for own in found]
        with policy.trainer.precision_plugin.forward_context():
            logp = policy.score(policy.entry, prompts, tokens, features, temperature=1.0)
        mismatch = Mismatch(engine_logps(found), logp.cpu())
        for name, value in mismatch.metrics().items():
            logger.info("engine against trainer before the first step: %s %.2e", name, value)
        check_mismatch(mismatch, prompts, found, max_mismatch)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _prepare(self, policy: PolicyModule, request: Request) -> Features:
        """Features of the prompts, and an engine in step; one that still generates is waited for."""
        if self._running is not None:
            wait([self._running])
            self._running = None
        with policy.phases("encode"):
            features = policy.encode(request.prompts)
        with policy.phases("sync"):
            self.engine.sync(self._family(policy), policy.model, request.step)
        return features

    def _family(self, policy: PolicyModule) -> CausalFamily:
        return policy.family if self.engine.reads_policy_weights else policy.engine_family

    def _in_weights(self, policy: PolicyModule, generate: Callable[[], Unscored]) -> Unscored:
        return policy.with_whole_weights(generate) if self.engine.reads_policy_weights else generate()

    def _generate(self, policy: PolicyModule, request: Request, features: Features) -> Unscored:
        return [self._share(policy, request, features, sampling) for sampling in request.samplings]

    def _share(
        self, policy: PolicyModule, request: Request, features: Features, sampling: SamplingParams
    ) -> list[Group]:
        """This rank's part of the groups: one call of the engine for whole prompts, one for each share of a prompt."""
        groups = []
        mine = self._pieces(policy, request, sampling)
        for (first, count), alike in itertools.groupby(mine, key=lambda piece: (piece.first, piece.count)):
            places = [piece.prompt for piece in alike]
            asked = [request.asked(place) for place in places]
            params = dataclasses.replace(sampling, num_generations=count)
            family = self._family(policy)
            answers = self.engine.generate(family, policy.model, asked, features, params, request.seed, first)
            groups += [Group(request.prompts[place], own) for place, own in zip(places, answers, strict=True)]
        return groups

    def _pieces(self, policy: PolicyModule, request: Request, sampling: SamplingParams) -> list[GenerationShard]:
        sp_group, ranks = policy.parallel.sp_group, self.engine.ranks_per_engine
        engine_rank = sp_group.rank // ranks
        return generation_shards(len(request.prompts), sampling.num_generations, engine_rank, sp_group.size // ranks)

    def _scored(self, policy: PolicyModule, request: Request, unscored: Unscored) -> list[list[Group]]:
        """The whole team's groups; of ranks that make up one engine the first has them scored."""
        sp_group, found = policy.parallel.sp_group, []
        with policy.phases("reward"):
            for sampling, groups in zip(request.samplings, unscored, strict=True):
                own = list(zip(self._pieces(policy, request, sampling), groups, strict=True))
                if sp_group.rank % self.engine.ranks_per_engine:
                    own = []
                with policy.parallel.world.raise_on_any_rank():
                    self.reward.score([group for _, group in own])
                found.append(gather_groups(request.prompts, own, sp_group, policy.parallel.num_gather_chunks))
        return found


def in_background(work: Callable[[], Unscored]) -> Future[Unscored]:
    """Runs `work` in a thread that does not keep a process alive which ends for another reason."""
    future: Future[Unscored] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
