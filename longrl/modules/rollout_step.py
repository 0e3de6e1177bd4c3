"""RL's optimizer steps on one rollout: what was said of its tokens before, what each was worth, the updates.

Letters: P prompts of this rank, G completions of each, N sampled tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrl.modules.distiller import DistilledLoss, Teaching
from longrl.modules.expert_load import ExpertLoads
from longrl.modules.mini_batches import (
    FlatGroups,
    MiniBatch,
    RolloutLoss,
    TokenLoss,
    flatten_groups,
    make_mini_batches,
)
from longrl.modules.scoring import TokenScores
from longrl.modules.step_statistics import UpdateMeans, lowest_over_ranks
from longrl.modules.token_statistics import TokenStatistics, token_statistics
from longrl.types import Batch, Features, Metrics

if TYPE_CHECKING:
    from longrl.modules.policy import PolicyModule


def rollout_step(policy: PolicyModule, batch: Batch) -> Metrics:
    """The optimizer steps on a batch's groups; metrics are the mean over them. No groups on any rank, no step."""
    groups = batch.groups or []
    if policy.features.disk:  # of what the rollout callback encoded
        policy.log_dict(policy.features.metrics(), batch_size=1)
    if policy.parallel.dp.max(len(groups)) == 0:
        return {}

    # 1. What the policies of before said of the tokens: the one that sampled, and the reference.
    flat = flatten_groups(groups, policy.device, policy.global_step, policy.steps_per_rollout)
    statistics = _token_statistics(policy, flat, batch.features)
    old_logp = _old_logp(policy, flat, batch.features, statistics.logp)  # [N]
    prompts = [group.prompt for group in groups]
    completions = [group.completions for group in groups]
    ref_logp = policy.reference_logp(prompts, completions, batch.features)  # [N]
    consistent = None
    if policy.consistency is not None:
        assert ref_logp is not None, "`rollouts_need_reference` has it made"
        consistent = policy.consistency.score(flat, ref_logp, policy.family.tokenizer)
        flat = consistent.flat
        ref_logp = ref_logp if policy.algorithm.kl_coef > 0 else None
    teaching = policy.teaching

    # 2. Advantages, and mini-batches of neighbouring groups.
    mini_batches = make_mini_batches(
        flat,
        policy.mini_batches_per_rollout,
        policy.algorithm,
        policy.parallel.dp,
        old_logp,
        ref_logp,
        statistics,
        token_rewards=None if teaching is None else teaching.token_rewards(old_logp),
        task_deviations=policy.deviations_of(flat),
    )

    # 3. Updates; metrics are means over them.
    means = _update(policy, batch.features, mini_batches, teaching)
    means |= policy.watch_batches(mini_batches)
    if consistent is not None:
        means |= consistent.metrics(policy.parallel.dp)
    if policy.mismatch_monitor is None:
        return means
    return means | policy.mismatch_monitor.metrics


def _update(
    policy: PolicyModule, features: Features, mini_batches: Sequence[MiniBatch], teaching: Teaching | None
) -> Metrics:
    """An optimizer step on each mini-batch, as often as a rollout is gone through."""
    taught: Sequence[Teaching | None] = [None] * len(mini_batches)
    if teaching is not None:
        taught = teaching.parts([len(mini_batch.advantages) for mini_batch in mini_batches])
        policy.has_signal |= teaching.has_signal

    # The weights of the first update are those that sampled: there engine and trainer are compared.
    monitor = policy.mismatch_monitor
    updates = UpdateMeans()
    entropies: list[Tensor] = []
    loads = ExpertLoads()
    in_order = [*zip(mini_batches, taught, strict=True)] * policy.epochs_per_rollout
    for mini_batch, said in in_order:
        prompts = [group.prompt for group in mini_batch.groups]
        completions = [group.completions for group in mini_batch.groups]
        loss: TokenLoss = RolloutLoss(policy.algorithm, mini_batch, monitor, entropies)
        if said is not None:
            cap = policy.algorithm.correction_cap
            loss = DistilledLoss(loss, said, mini_batch.weights, drawn_logp=mini_batch.drawn_logp, cap=cap)
        metrics = policy.take_step(prompts, completions, features, loss, loads, monitor)
        monitor = None
        updates.add(metrics)

    means = updates.collect()
    if teaching is not None:
        means = teaching.finish(means, policy.parallel.dp)
    means["entropy_min"] = lowest_over_ranks(entropies, policy.parallel.world)
    return means | loads.metrics(policy.parallel.world)


def _token_statistics(policy: PolicyModule, flat: FlatGroups, features: Features) -> TokenStatistics:
    """What the objective reads of the tokens beside log-probabilities, for most nothing; `token_statistics`."""
    prompts = [group.prompt for group in flat.groups]
    completions = [group.completions for group in flat.groups]

    def score(temperature: float) -> TokenScores:
        policy.num_scoring_passes += 1
        return policy.scoring.scores(policy.policy, prompts, completions, features, temperature)

    return token_statistics(policy.algorithm, score, policy.temperature)


def _old_logp(policy: PolicyModule, flat: FlatGroups, features: Features, scored: Tensor | None) -> Tensor | None:
    """[N] log-probabilities before the update, or None if they are those of the first and only update.

    Tokens of older weights have the sampler's, unless the objective is decoupled; so have all of a trusted engine.
    `scored` [N] are the policy's, where it has been asked already.
    """
    dp = policy.parallel.dp
    decoupled = policy.algorithm.decoupled
    in_reward = policy.algorithm.kl_coef > 0 and policy.algorithm.kl_placement == "reward"
    if policy.distiller is not None and policy.distiller.distillation.placement == "advantage":
        in_reward = True
    num_stale = dp.max(0 if decoupled else flat.num_stale)
    if policy.steps_per_rollout == 1 and not in_reward and not num_stale:
        return None
    is_known = flat.sampler_logp.isfinite()  # [N]
    if not decoupled:
        num_unknown = dp.max(int((~is_known).sum()))
        num_on_policy = dp.max(len(flat.staleness) - flat.num_stale)
        is_trusted = False
        if policy.mismatch_monitor is not None and not in_reward:
            is_trusted = policy.mismatch_monitor.bypasses_old_logp
        if not num_unknown and (is_trusted or not num_on_policy):
            return flat.sampler_logp
    old_logp = scored
    if old_logp is None:
        prompts = [group.prompt for group in flat.groups]
        completions = [group.completions for group in flat.groups]
        # By the experts that sampled, as in the update: the ratio is that of the weights alone (arXiv:2510.11370).
        old_logp = policy.score(policy.policy, prompts, completions, features)  # [N]
    if decoupled:
        return old_logp
    return torch.where((flat.staleness == 0) | ~is_known, old_logp, flat.sampler_logp)
