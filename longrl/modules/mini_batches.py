"""Groups of completions as the mini-batches of a rollout, and the losses of their tokens.

Letters: P groups, G completions of each, C = P * G, N tokens of all of them, completion after completion; R scored rows
of a micro-batch. All are this rank's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeVar

from longrl.algorithms import Algorithm, HighEntropy, LossOutput, high_entropy
from longrl.modules.mismatch import MismatchMonitor
from longrl.modules.staleness import token_staleness
from longrl.modules.step_statistics import completion_means
from longrl.modules.token_statistics import NO_STATISTICS, TokenStatistics
from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Packed, PolicyOutput, PromptT

# -- groups ------------------------------------------------------------------------------------------------------


class ScoredSample(Protocol):
    """A completion, or another sample whose steps are its tokens."""

    @property
    def logprobs(self) -> Tensor:
        """[S] float32 log-probability of each token under the distribution it was sampled from."""


ScoredT = TypeVar("ScoredT", bound=ScoredSample, default=Completion)


@dataclass(frozen=True)
class FlatGroups(Generic[PromptT, ScoredT]):
    """The groups of a rollout as flat tensors. A rank may have none while others have some."""

    groups: Sequence[Group[PromptT, ScoredT]]
    lengths: Tensor
    """[C] sampled tokens of each completion."""
    rewards: Tensor
    """[P, G]"""
    valid: Tensor
    """[P, G] bool."""
    in_loss: Tensor
    """[P, G] bool: valid, and not left out of the loss alone."""
    parts: Mapping[str, Tensor]
    """Name of each part of the reward -> [P, G], NaN where it does not apply."""
    part_weights: Mapping[str, Tensor]
    """Likewise [P], its weight in the reward."""
    baselines: Tensor | None
    """[P] rewards of greedy completions, if the groups have them."""
    sampler_logp: Tensor
    """[N] log-probabilities as the engine reported them."""
    staleness: Tensor
    """[N] int64 age of the weights that sampled each token, in rollouts; 0 is the weights of this step."""
    num_stale: int
    """Tokens that other weights than those of this step sampled."""
    offsets: Sequence[int]
    """P + 1 numbers: where each group's tokens begin, and the end."""


def flatten_groups(
    groups: Sequence[Group[PromptT, ScoredT]], device: torch.device, step: int = 0, steps_per_rollout: int = 1
) -> FlatGroups[PromptT, ScoredT]:
    """The groups of a step with what algorithms read of them.

    Args:
        groups: this rank's.
        device: of all tensors.
        step: optimizer steps taken so far, by which `Completion.versions` are old.
        steps_per_rollout: optimizer steps of one rollout, the unit of that age.
    """
    num_generations = len(groups[0].completions) if groups else 1  # a rank may have no group
    logprobs = [completion.logprobs for group in groups for completion in group.completions]
    lengths = torch.tensor([len(logp) for logp in logprobs], dtype=torch.int64)  # [C]
    num_tokens = lengths.view(-1, num_generations).sum(1)  # [P]
    staleness = [
        token_staleness(completion, group.carried_over, step, steps_per_rollout)
        for group in groups
        for completion in group.completions
    ]
    all_staleness = torch.cat([torch.zeros(0, dtype=torch.int64), *staleness])  # [N]
    no_rewards = torch.zeros(0, num_generations)
    rewards = [group.rewards[None] for group in groups]  # [1, G] each
    valid = [group.valid[None] for group in groups]
    in_loss = []
    for group in groups:
        mask = group.valid if group.in_loss is None else group.in_loss
        in_loss.append(mask[None])
    parts, part_weights = reward_parts(groups)
    baselines = [group.baseline for group in groups if group.baseline is not None]
    baseline = None
    if len(baselines) == len(groups):
        baseline = torch.tensor(baselines, device=device)  # [P]
    return FlatGroups(
        groups=groups,
        lengths=lengths.to(device),
        rewards=torch.cat([no_rewards, *rewards]).to(device),
        valid=torch.cat([no_rewards.bool(), *valid]).to(device),
        in_loss=torch.cat([no_rewards.bool(), *in_loss]).to(device),
        parts={name: values.to(device) for name, values in parts.items()},
        part_weights={name: values.to(device) for name, values in part_weights.items()},
        baselines=baseline,
        sampler_logp=torch.cat([torch.zeros(0), *logprobs]).to(device),
        staleness=all_staleness.to(device),
        num_stale=int((all_staleness > 0).sum()),
        offsets=[0, *num_tokens.cumsum(0).tolist()],
    )


def reward_parts(groups: Sequence[Group[PromptT, ScoredT]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name of each part of the reward that has a weight -> its values [P, G], NaN where it does not apply; weights [P].

    Groups that another reward has scored (of a checkpoint, with other options) may lack a part.
    """
    names = dict.fromkeys(name for group in groups for name in group.part_weights or {})
    values = {}
    weights = {}
    for name in names:
        of_groups = [group.reward_parts.get(name, torch.full_like(group.rewards, math.nan)) for group in groups]
        values[name] = torch.stack(of_groups)
        of_part = [(group.part_weights or {}).get(name, 0.0) for group in groups]
        weights[name] = torch.tensor(of_part, dtype=torch.float64)
    return values, weights


# -- mini-batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiniBatch(Generic[PromptT, ScoredT]):
    """The scored groups of one optimizer step."""

    groups: Sequence[Group[PromptT, ScoredT]]
    advantages: Tensor
    """[N]"""
    old_logp: Tensor | None
    """[N], or None where the policy that sampled is the one being updated."""
    ref_logp: Tensor | None
    """[N], or None without KL in the loss."""
    sampler_logp: Tensor
    """[N] as the engine reported them."""
    staleness: Tensor
    """[N] rollouts that each token is old, 0 where the weights of this step sampled it."""
    weights: Tensor
    """[C] weight of every token of a completion."""
    nonfinite: Tensor
    """[C] bool, True for completions that are left out, for a score or advantage of theirs is not finite."""
    high_entropy: HighEntropy | None = None
    """The tokens that get the policy gradient, where not all do."""
    reward_kl: Tensor | None = None
    """[N] KL estimates that were taken off the rewards, where a control of the coefficient reads them."""

    @property
    def drawn_logp(self) -> Tensor | None:
        """[N] log-probabilities under the policy that drew each token, None where it is the one being updated.

        They are the sampler's where older weights drew it, if that said them, also of a decoupled objective.
        """
        if self.old_logp is None:
            return None
        said = (self.staleness > 0) & self.sampler_logp.isfinite()
        return self.sampler_logp.where(said, self.old_logp)

    def tensors(self) -> dict[str, Tensor]:
        """All that the loss reads beside tokens, by name."""
        named = {
            "advantages": self.advantages,
            "sampler_logp": self.sampler_logp,
            "weights": self.weights,
        }
        if self.old_logp is not None:
            named["old_logp"] = self.old_logp
        if self.ref_logp is not None:
            named["ref_logp"] = self.ref_logp
        if self.high_entropy is not None:
            named["high_entropy"] = self.high_entropy.chosen
        if self.staleness.any():
            named["staleness"] = self.staleness
        if self.groups:
            named["rewards"] = torch.stack([group.rewards for group in self.groups])
            named["valid"] = torch.stack([group.valid for group in self.groups])
        return named


def make_mini_batches(
    flat: FlatGroups[PromptT, ScoredT],
    count: int,
    algorithm: Algorithm,
    dp: Axis,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    statistics: TokenStatistics = NO_STATISTICS,
    token_rewards: Tensor | None = None,
    task_deviations: Tensor | None = None,
) -> list[MiniBatch[PromptT, ScoredT]]:
    """The groups of a rollout with their advantages, in mini-batches; every rank of the run must call it.

    Args:
        flat: this rank's groups.
        count: mini-batches, if a rank has as many groups.
        algorithm: the objective.
        dp: ranks with other groups.
        old_logp: [N] log-probabilities before the update, or None where it is the first.
        ref_logp: [N] of the reference policy, or None without KL penalty.
        statistics: what the objective reads of the tokens beside that.
        token_rewards: [N] rewards of tokens for themselves alone, added to their advantages.
        task_deviations: [P] of the rewards of each group's task, where the algorithm has a `task_decay`.
    """
    # 1. A completion with a score that is not finite is not valid: it enters no mean. The score becomes one without
    #    meaning, for 0 * nan would be nan.
    has_scores = finite_completions(flat.lengths, old_logp, ref_logp, statistics.gradient_norms)  # [C]
    valid = flat.valid & has_scores.view_as(flat.valid)  # [P, G]
    if old_logp is not None:
        old_logp = old_logp.nan_to_num(0.0, 0.0, 0.0)
    if ref_logp is not None:
        ref_logp = ref_logp.nan_to_num(0.0, 0.0, 0.0)

    # 2. Advantages of the whole rollout; a KL penalty is part of the reward, or left for the loss.
    penalty = None
    if ref_logp is not None and algorithm.kl_placement == "reward":
        assert old_logp is not None
        penalty = algorithm.kl(old_logp, ref_logp)  # [N]
        ref_logp = None
    advantages = algorithm.token_advantages(  # [N]
        flat.rewards,
        valid,
        flat.lengths,
        kl=penalty,
        baseline=flat.baselines,
        all_reduce=dp.sum,
        parts=flat.parts,
        part_weights=flat.part_weights,
        gradient_norms=statistics.gradient_norms,
        task_deviations=task_deviations,
    )
    if token_rewards is not None:
        is_counted = valid.flatten().repeat_interleave(flat.lengths)  # [N]
        advantages = advantages + token_rewards.where(is_counted, 0.0)
    # A function of the user's may give advantages that are not finite.
    in_loss = flat.in_loss.flatten()  # [C]
    kept = in_loss & has_scores & finite_completions(flat.lengths, advantages)
    advantages = advantages.nan_to_num(0.0, 0.0, 0.0)

    # 3. Neighbouring groups, as equal in number as can be; a rank with few groups gets empty mini-batches.
    num_groups, num_generations = flat.rewards.shape
    count = min(count, dp.max(num_groups))
    edges = [num_groups * index // count for index in range(count + 1)]
    mini_batches = []
    for start, stop in itertools.pairwise(edges):
        tokens = slice(flat.offsets[start], flat.offsets[stop])
        completions = slice(start * num_generations, stop * num_generations)
        weights = algorithm.token_weights(flat.lengths[completions], kept[completions], dp.sum)  # [C]
        chosen = None
        if statistics.entropy is not None and algorithm.top_entropy_share < 1:
            counted = (weights > 0).repeat_interleave(flat.lengths[completions])  # [N]
            chosen = high_entropy(statistics.entropy[tokens], counted, algorithm.top_entropy_share, dp.sum)
        mini_batches.append(
            MiniBatch(
                groups=flat.groups[start:stop],
                advantages=advantages[tokens],
                old_logp=None if old_logp is None else old_logp[tokens],
                ref_logp=None if ref_logp is None else ref_logp[tokens],
                sampler_logp=flat.sampler_logp[tokens],
                staleness=flat.staleness[tokens],
                weights=weights,
                nonfinite=(in_loss & ~kept)[completions],
                high_entropy=chosen,
                reward_kl=None if penalty is None or algorithm.kl_control is None else penalty[tokens],
            )
        )
    return mini_batches


def finite_completions(lengths: Tensor, *scores: Tensor | None) -> Tensor:
    """Completions all of whose tokens have finite scores.

    Args:
        lengths: [C] tokens of each.
        scores: [N] each, or None.

    Returns:
        [C] bool.
    """
    finite = lengths >= 0
    for values in scores:
        if values is None:
            continue
        # `unsafe` leaves checks out for which a GPU would be waited for.
        known = values.isfinite().float()
        lowest = torch.segment_reduce(known, "min", lengths=lengths, initial=1.0, unsafe=True)
        finite = finite & lowest.bool()
    return finite


# -- losses ------------------------------------------------------------------------------------------------------


class TokenLoss(Protocol):
    """The loss of the scored rows of a micro-batch, with metrics that add up over micro-batches."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """Sums over the rows of one micro-batch."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the loss reads beside tokens, by name."""

    def forward_options(self, packed: Packed | None, here: Packed) -> dict[str, Any]:
        """What the policy's forward pass is told of a micro-batch, for most losses nothing.

        Args:
            packed: on the host; None of a micro-batch to wait through.
            here: the same on the device.
        """
        return {}


@dataclass(frozen=True)
class RolloutLoss(TokenLoss):
    """The algorithm's objective on a mini-batch of rollouts."""

    algorithm: Algorithm
    mini_batch: MiniBatch
    monitor: MismatchMonitor | None = None
    """Also told of every token's log-probability, in the first update on a rollout."""
    entropies: list[Tensor] = field(default_factory=list)
    """Gets the mean entropies of each micro-batch's completions."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        mini_batch = self.mini_batch
        rows = packed.token_index  # [R]
        weights = mini_batch.weights[packed.completion_index].to(output.logp.device)  # [R]
        sampler_logp = mini_batch.sampler_logp[rows]  # [R]
        if self.monitor is not None:
            self.monitor.add_tokens(sampler_logp, output.logp, mini_batch.staleness[rows])
        old_logp = output.logp.detach()  # [R], of the weights being updated unless others have sampled
        if mini_batch.old_logp is not None:
            old_logp = mini_batch.old_logp[rows]
        result = self.algorithm.loss(
            logp=output.logp,
            old_logp=old_logp,
            ref_logp=None if mini_batch.ref_logp is None else mini_batch.ref_logp[rows],
            sampler_logp=sampler_logp,
            advantages=self._advantages(rows),
            weights=weights,
            completion_index=packed.completion_index,
            stale=mini_batch.staleness[rows] > 0,
        )
        of_completions = completion_means(output.entropy.detach(), packed.completion_index, len(mini_batch.weights))
        self.entropies.append(of_completions)
        entropy = (output.entropy * weights).sum()
        metrics = {"entropy": entropy.detach(), **result.metrics}
        if mini_batch.high_entropy is not None:
            metrics["entropy_threshold"] = (mini_batch.high_entropy.threshold * weights).sum()
            metrics["high_entropy_share"] = (mini_batch.high_entropy.chosen[rows] * weights).sum()
        if mini_batch.reward_kl is not None:
            metrics["kl_ref"] = (mini_batch.reward_kl[rows] * weights).sum()
        loss = result.loss
        if self.algorithm.entropy_coef > 0:
            loss = loss - self.algorithm.entropy_coef * entropy
        return LossOutput(loss, metrics)

    def _advantages(self, rows: Tensor) -> Tensor:
        """[R] advantages of tokens; 0, of which a surrogate has no gradient, for those that are to have none."""
        advantages = self.mini_batch.advantages[rows]
        if self.mini_batch.high_entropy is None:
            return advantages
        return advantages.where(self.mini_batch.high_entropy.chosen[rows], 0.0)

    def forward_options(self, packed: Packed | None, here: Packed) -> dict[str, Any]:
        """See `TokenLoss`: a bonus needs the entropies' gradient."""
        return {"entropy_gradient": self.algorithm.entropy_coef > 0}

    def tensors(self) -> dict[str, Tensor]:
        """See `TokenLoss`."""
        return self.mini_batch.tensors()
