"""What every rollout is made of, one after the other or beside the update: encode, sync, generate, reward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from longrl.callbacks.environment_rollouts import EnvironmentRollouts
from longrl.callbacks.frame_order import FrameOrder
from longrl.callbacks.group_scores import scored_groups
from longrl.datamodules.loading.schedules import Schedule
from longrl.engines.rollout_engine import (
    GeneratedShards,
    RolloutEngine,
    RolloutRequest,
    generate_shards,
    prompt_seed,
    sampling_ids,
)
from longrl.features.rollout_features import RolloutFeatures
from longrl.models.base import CausalFamily
from longrl.modules.policy import PolicyModule
from longrl.rewards import RewardSum
from longrl.rewards.failures import Failure
from longrl.strategies.parallel import Parallel
from longrl.types import Group, Media, Metrics, Prompt, SamplingParams


@dataclass
class StepGroups:
    """What a step trains on, and what was sampled for it."""

    groups: list[Group]
    """Of this rank; fewer than were asked for if too many had nothing to learn from."""
    sampled: list[Group]
    """All that were drawn for the step, selected or not."""
    num_rounds: int
    """How often further prompts were sampled, because groups were missing."""
    surplus: list[Group] = field(default_factory=list)
    """Kept ones that wait for the next step."""
    counts: Metrics = field(default_factory=dict)
    """Further metrics, sums over data-parallel ranks."""
    means: Metrics = field(default_factory=dict)
    """Further metrics, means over data-parallel ranks."""


class GroupSource(Protocol):
    """Where a step's groups come from. Every rank must call each method at the same time."""

    def step_groups(self, module: PolicyModule, batch_prompts: Sequence[Prompt], step: int) -> StepGroups:
        """The groups of a step.

        Args:
            module: trains.
            batch_prompts: of this rank's batch.
            step: optimizer steps that were done.
        """

    def before_update(self, module: PolicyModule, step: int) -> None:
        """The step has what it needs: the engine may go on."""

    def undo_step(self) -> bool:
        """A step could not be made: what it took waits again. True if its batch is to be read again, too."""

    def before_evaluation(self, parallel: Parallel) -> None:
        """Leaves the engine to an evaluation, until `after_evaluation`; once or for each of its batches."""

    def after_evaluation(self) -> None:
        """Goes on."""

    def save(self, parallel: Parallel) -> dict[str, Any]:
        """All that a later step is to train on."""

    def load(self, saved: Mapping[str, Any], parallel: Parallel) -> None:
        """Takes what this rank had saved, or with another number of ranks its part of what all had."""

    def close(self) -> None:
        """The run is over."""


class RolloutSteps:
    """The steps of a rollout.

    Args:
        engine: generates.
        reward: scores completions.
        sampling: of training rollouts.
        seed: of the run's sampling.
        environment: answers the turns of completions, if there is one.
        failures: gets those of rewards.
        lengths: `max_completion_tokens` by optimizer step, in place of that of `sampling`, which none is above.
        frame_order: compares groups with such of shuffled frames, if it is asked for.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        reward: RewardSum,
        sampling: SamplingParams,
        seed: int,
        environment: EnvironmentRollouts,
        failures: list[Failure],
        lengths: Schedule | None = None,
        frame_order: FrameOrder | None = None,
    ) -> None:
        self.engine = engine
        self.reward = reward
        self.sampling = sampling
        self.seed = seed
        self.environment = environment
        self.failures = failures
        self.lengths = lengths
        self.frame_order = frame_order
        self.num_rollouts = 0
        self.family: CausalFamily
        """In the precision that the engine computes in; known from `setup` on."""

    def samplings(self, module: PolicyModule) -> list[SamplingParams]:
        """The ways in which every prompt is sampled that is asked now."""
        sampling = self.sampling
        if self.lengths is not None:
            sampling = replace(sampling, max_completion_tokens=self.max_completion_tokens(module.global_step))
        # ReMax: one greedy completion more of every prompt.
        if module.algorithm.greedy_baseline:
            return [sampling, replace(sampling, num_generations=1, temperature=0.0)]
        return [sampling]

    def max_completion_tokens(self, step: int) -> int:
        """Of the completions that begin when so many optimizer steps were done."""
        return self.sampling.max_completion_tokens if self.lengths is None else int(self.lengths.at(step))

    def next_request(self, module: PolicyModule, prompts: Sequence[Prompt]) -> RolloutRequest:
        """The next rollout of the run, numbered: the number is part of its seed."""
        self.num_rollouts += 1
        seed = prompt_seed(self.seed, f"rollout {self.num_rollouts}")
        ids = sampling_ids([prompt.id for prompt in prompts], module.parallel.dp)
        engine_prompts = []
        for prompt, sampling_id in zip(prompts, ids, strict=True):
            engine_prompts.append(replace(prompt, id=sampling_id))
        samplings = self.samplings(module)
        request = RolloutRequest(prompts, engine_prompts, samplings, seed)
        if self.frame_order is None:
            return request
        return self.frame_order.shuffled_request(self.family, request, samplings[0])

    def encode(
        self, module: PolicyModule, prompts: Sequence[Prompt], reordered: Sequence[Media] = ()
    ) -> RolloutFeatures:
        """Features of prompts, every rank its shard of the frames; and room for those of what completions are shown.

        Args:
            module: has the encoder and the cache.
            prompts: this rank's.
            reordered: their videos with the cells in another order, for which nothing is encoded.
        """
        with module.phases("encode"):
            return RolloutFeatures(module.features.get_or_encode(module.model, prompts), module.features, reordered)

    def sync(self, module: PolicyModule, step: int) -> None:
        """Hands the weights of a step over, unless the engine has them. Every rank must call it."""
        with self.counted_sync(module):
            self.engine.sync(self.family, module.model, step)

    @contextlib.contextmanager
    def counted_sync(self, module: PolicyModule) -> Iterator[None]:
        """Time and bytes of the weights that are handed over inside."""
        before = self.engine.num_synced_bytes
        with module.phases("sync"):
            yield
        module.num_synced_bytes += self.engine.num_synced_bytes - before

    def generate(
        self, module: PolicyModule, request: RolloutRequest, features: RolloutFeatures
    ) -> list[GeneratedShards]:
        """This rank's shards of the groups. An error of one rank is one of all: none waits for another."""
        reads_weights = self.engine.reads_policy_weights
        sp_group = module.parallel.sp_group
        with (
            module.phases("generate"),
            module.trainer.precision_plugin.forward_context(),
            module.parallel.world.raise_on_any_rank(),
            module.policy.unsharded() if reads_weights else contextlib.nullcontext(),
        ):
            return generate_shards(
                self.engine, self.family, module.model, request, features, sp_group, self.environment.runner
            )

    def score(self, module: PolicyModule, request: RolloutRequest, generated: Sequence[GeneratedShards]) -> list[Group]:
        """The groups of all prompts: every rank rewards its shards."""
        with module.phases("reward"):
            groups = scored_groups(
                self.reward, request, generated, module.parallel, self.engine.ranks_per_engine, self.failures
            )
        if self.frame_order is not None:
            self.frame_order.add_bonus(groups)
        return groups
