"""From completions on each rank to groups with rewards on all that share prompts."""

from __future__ import annotations

from collections.abc import Sequence

from longrl.engines.rollout_engine import GeneratedShards, RolloutRequest, gather_groups
from longrl.rewards import RewardSum
from longrl.rewards.failures import Failure
from longrl.rewards.reward_sum import ACCURACY_NAME
from longrl.strategies.parallel import Parallel
from longrl.types import Group


def scored_groups(
    reward: RewardSum,
    request: RolloutRequest,
    generated: Sequence[GeneratedShards],
    parallel: Parallel,
    ranks_per_engine: int,
    failures: list[Failure] | None = None,
) -> list[Group]:
    """The groups of all prompts, scored: every rank rewards its shards. Every rank of the run must call it.

    Args:
        reward: scores completions.
        request: what was asked for.
        generated: this rank's shards, of each way of sampling; of a second one come the baselines, of
            `request.shuffled` the accuracies to compare with.
        parallel: the ranks that share prompts.
        ranks_per_engine: neighbours that have the same completions.
        failures: gets this rank's.
    """
    sp_group = parallel.sp_group
    is_first_of_engine = sp_group.rank % ranks_per_engine == 0
    by_sampling = []
    asked = [request.prompts] * len(request.samplings)
    if request.shuffled is not None:
        asked.append(request.shuffled.prompts)
    for prompts, shards in zip(asked, generated, strict=True):
        local = shards if is_first_of_engine else []
        with parallel.world.raise_on_any_rank():
            reward.score([group for _, group in local], failures)
        by_sampling.append(gather_groups(prompts, local, sp_group, parallel.num_gather_chunks))
    groups = by_sampling[0]
    if request.shuffled is not None:  # T-GRPO: of completions with shuffled frames their accuracy alone is of use
        for index, shuffled in zip(request.shuffled_of, by_sampling.pop(), strict=True):
            accuracy = shuffled.reward_parts[ACCURACY_NAME]
            groups[index].shuffled_accuracy = accuracy[shuffled.valid & ~accuracy.isnan()]
    for greedy_groups in by_sampling[1:]:  # ReMax: the reward of a greedy completion is the group's baseline
        for group, greedy in zip(groups, greedy_groups, strict=True):
            group.baseline = float(greedy.rewards[0])
            group.valid = group.valid & greedy.valid
    return groups
