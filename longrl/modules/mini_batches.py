"""Groups of completions as the mini-batches of a rollout, and the losses of their tokens.

Letters: P groups, G completions of each, C = P * G, N tokens of all of them, completion after completion; R scored rows
of a micro-batch. All are this rank's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeVar

from longrl.algorithms import Algorithm, LossOutput
from longrl.engines.parity import MismatchMonitor
from longrl.strategies.axis import Axis
from longrl.types import Batch, Completion, Group, Packed, PolicyOutput, PromptT

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
    """[C] tokens of each completion."""
    rewards: Tensor
    """[P, G]"""
    valid: Tensor
    """[P, G] bool."""
    baselines: Tensor | None
    """[P] rewards of greedy completions, if the groups have them."""
    sampler_logp: Tensor
    """[N] log-probabilities as the engine reported them."""
    on_policy: Tensor
    """[N] bool, True for tokens that the weights of this step sampled, False for those of carried-over groups."""
    offsets: Sequence[int]
    """P + 1 numbers: where each group's tokens begin, and the end."""


def flatten_groups(groups: Sequence[Group[PromptT, ScoredT]], device: torch.device) -> FlatGroups[PromptT, ScoredT]:
    """The groups of a step with what algorithms read of them, on `device`."""
    lengths: list[int] = []
    offsets = [0]
    sampler_logp = [torch.zeros(0)]  # a rank may have no group
    num_generations = len(groups[0].completions) if groups else 1
    rewards = [torch.zeros(0, num_generations)]
    valid = [torch.zeros(0, num_generations, dtype=torch.bool)]
    on_policy = [torch.zeros(0, dtype=torch.bool)]
    baselines: list[float] = []
    for group in groups:
        assert group.rewards is not None
        assert group.valid is not None
        of_group = [len(completion.logprobs) for completion in group.completions]
        num_tokens = sum(of_group)
        lengths += of_group
        offsets.append(offsets[-1] + num_tokens)
        sampler_logp += [completion.logprobs for completion in group.completions]
        rewards.append(group.rewards[None])
        valid.append(group.valid[None])
        on_policy.append(torch.full((num_tokens,), not group.carried_over))
        if group.baseline is not None:
            baselines.append(group.baseline)
    return FlatGroups(
        groups=groups,
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        rewards=torch.cat(rewards).to(device),
        valid=torch.cat(valid).to(device),
        baselines=torch.tensor(baselines, device=device) if len(baselines) == len(groups) else None,
        sampler_logp=torch.cat(sampler_logp).to(device),
        on_policy=torch.cat(on_policy).to(device),
        offsets=offsets,
    )


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
    on_policy: Tensor
    """[N] bool, True for tokens sampled by the weights of this step."""
    weights: Tensor
    """[C] weight of every token of a completion."""


def make_mini_batches(
    flat: FlatGroups[PromptT, ScoredT],
    count: int,
    algorithm: Algorithm,
    dp: Axis,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
) -> list[MiniBatch[PromptT, ScoredT]]:
    """The groups of a rollout with their advantages, in mini-batches; every rank of the run must call it.

    Args:
        flat: this rank's groups.
        count: mini-batches, if a rank has as many groups.
        algorithm: the objective.
        dp: ranks with other groups.
        old_logp: [N] log-probabilities before the update, or None where it is the first.
        ref_logp: [N] of the reference policy, or None without KL penalty.
    """
    # 1. Advantages of the whole rollout; a KL penalty is part of the reward, or left for the loss.
    penalty = None
    if ref_logp is not None and algorithm.kl_placement == "reward":
        assert old_logp is not None
        penalty = algorithm.kl(old_logp, ref_logp)  # [N]
        ref_logp = None
    advantages = algorithm.token_advantages(  # [N]
        flat.rewards,
        flat.valid,
        flat.lengths,
        kl=penalty,
        baseline=flat.baselines,
        all_reduce=dp.sum,
    )

    # 2. Neighbouring groups, as equal in number as can be; a rank with few groups gets empty mini-batches.
    num_groups, num_generations = flat.rewards.shape
    count = min(count, dp.max(num_groups))
    edges = [num_groups * index // count for index in range(count + 1)]
    mini_batches = []
    for start, stop in itertools.pairwise(edges):
        tokens = slice(flat.offsets[start], flat.offsets[stop])
        completions = slice(start * num_generations, stop * num_generations)
        valid = flat.valid[start:stop].flatten()  # [C]
        weights = algorithm.token_weights(flat.lengths[completions], valid, dp.sum)  # [C]
        mini_batches.append(
            MiniBatch(
                groups=flat.groups[start:stop],
                advantages=advantages[tokens],
                old_logp=None if old_logp is None else old_logp[tokens],
                ref_logp=None if ref_logp is None else ref_logp[tokens],
                sampler_logp=flat.sampler_logp[tokens],
                on_policy=flat.on_policy[tokens],
                weights=weights,
            )
        )
    return mini_batches


# -- losses ------------------------------------------------------------------------------------------------------


class TokenLoss(Protocol):
    """The loss of the scored rows of a micro-batch, with metrics that add up over micro-batches."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """Sums over the rows of one micro-batch."""


@dataclass(frozen=True)
class SFTLoss:
    """Negative log-likelihood per response token of the whole batch."""

    num_tokens: int
    """Response tokens of all ranks."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        loss = -output.logp.sum() / self.num_tokens
        return LossOutput(loss, {"entropy": output.entropy.sum() / self.num_tokens})


@dataclass(frozen=True)
class RolloutLoss:
    """The algorithm's objective on a mini-batch of rollouts."""

    algorithm: Algorithm
    mini_batch: MiniBatch
    monitor: MismatchMonitor | None = None
    """Also told of every token's log-probability, in the first update on a rollout."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        mini_batch = self.mini_batch
        rows = packed.token_index  # [R]
        weights = mini_batch.weights[packed.completion_index].to(output.logp.device)  # [R]
        sampler_logp = mini_batch.sampler_logp[rows]  # [R]
        if self.monitor is not None:
            comparable = mini_batch.on_policy[rows] | self.monitor.one_step_off  # [R]
            self.monitor.add_tokens(sampler_logp[comparable], output.logp[comparable])
        old_logp = output.logp.detach()  # [R], of the weights being updated unless others have sampled
        if mini_batch.old_logp is not None:
            old_logp = mini_batch.old_logp[rows]
        result = self.algorithm.loss(
            logp=output.logp,
            old_logp=old_logp,
            ref_logp=None if mini_batch.ref_logp is None else mini_batch.ref_logp[rows],
            sampler_logp=sampler_logp,
            advantages=mini_batch.advantages[rows],
            weights=weights,
            completion_index=packed.completion_index,
        )
        entropy = (output.entropy * weights).sum()
        return LossOutput(result.loss, {"entropy": entropy, **result.metrics})


def response_targets(batch: Batch) -> list[list[Tensor]]:
    """The SFT target of each prompt.

    Raises:
        ValueError: the prompts have none, for they are meant to be answered by a rollout callback.
    """
    targets = []
    for prompt in batch.prompts:
        if prompt.response_ids is None:
            raise ValueError(
                "data.stage=rl gives prompts without targets, and no RolloutCallback is there to answer them; set "
                "rollout.reward (configs/reward/), or data.stage to sft"
            )
        targets.append([prompt.response_ids])
    return targets
