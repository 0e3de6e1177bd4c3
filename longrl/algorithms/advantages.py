"""Selections and advantages: which groups of a rollout train, and what each completion was worth.

Letters: P prompts, G completions of each, C = P * G completions in the order p * G + g, N tokens of all of them,
completion after completion.

A selection is `list[Group] -> list[Group]` and changes none of its groups. The caller samples more prompts while too
few groups are left, and keeps the surplus for the next step.

An advantage takes the `Outcomes` of a rollout and returns [P, G], which all tokens of a completion share, or [N], one
value per token. Completions that are not valid enter no mean and no deviation, and get 0. Sums are taken in float64:
rewards are float32, so the mean of equal rewards is exactly that reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longrl.algorithms.losses import AllReduce, single_rank
from longrl.algorithms.needs import needs
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.types import Group

Selection = Callable[[list[Group[Any, Any]]], list[Group[Any, Any]]]

# ---- which groups train ----


def keep_all(groups: list[Group[Any, Any]]) -> list[Group[Any, Any]]:
    """Every group trains."""
    return groups


@needs(groups=True, full_distribution=True)
def drop_uniform(groups: list[Group[Any, Any]]) -> list[Group[Any, Any]]:
    """Dynamic sampling: drops groups all right or all wrong. DAPO, arXiv:2503.14476, sec. 3.2: 0 < #right < G.

    Looked at is the reward part `accuracy`, or the reward if there is none, of the valid completions: a group stays if
    it has two that differ. Where accuracy does not apply to the row, the reward counts. (EasyR1 and Long-RL keep 0.01 <
    mean < 0.99 of the whole reward, where a format reward lets all-wrong groups pass.)
    """
    contrasting = []
    for group in groups:
        values = group.reward_parts.get("accuracy", group.rewards)  # [G]
        assert values is not None, "groups are selected after they were rewarded"
        if values.isnan().any():  # it does not apply to the row
            values = group.rewards
        values = values[_valid(group)]
        if (values != values[:1]).any():
            contrasting.append(group)
    return contrasting


def mask_truncated(groups: list[Group]) -> list[Group]:
    """Overlong filtering, stricter than the paper's: completions cut off by the limit are no longer valid.

    They leave the loss, as in DAPO, arXiv:2503.14476, sec. 3.4, and beyond that mean, deviation and contrast of their
    group. `mask_truncated_loss` is the paper's.
    """
    masked = []
    for group in groups:
        masked.append(replace(group, valid=_valid(group) & _finished(group)))
    return masked


def mask_truncated_loss(groups: list[Group]) -> list[Group]:
    """Overlong filtering: completions cut off by the limit leave the loss. DAPO, arXiv:2503.14476, sec. 3.4.

    Their rewards still count in mean, deviation and contrast of their group, as with `mask_truncated_completions` of
    TRL; their tokens count in no weight. (Under `sequence_mean` TRL divides by the number of all completions, here by
    that of those in the loss.)
    """
    return [replace(group, in_loss=_valid(group) & _finished(group)) for group in groups]


def _finished(group: Group) -> Tensor:
    """[G] bool: not cut off by the limit."""
    finished = [completion.finish_reason != "length" for completion in group.completions]
    return torch.tensor(finished, dtype=torch.bool)


@dataclass(frozen=True)
class InOrder:
    """Several selections, each on what the one before left.

    Example:
        `InOrder([mask_truncated, drop_uniform])` looks for contrast among the completions that were not cut off.
    """

    steps: list[FunctionOrPath[Selection]]

    def __post_init__(self) -> None:
        steps = [resolve_function(step, "model.algorithm.select", ("groups",)) for step in self.steps]
        object.__setattr__(self, "steps", steps)

    def __call__(self, groups: list[Group[Any, Any]]) -> list[Group[Any, Any]]:
        """The groups that every step lets pass."""
        for step in self.steps:
            groups = step(groups)
        return groups


def _valid(group: Group[Any, Any]) -> Tensor:
    return torch.ones(len(group.completions), dtype=torch.bool) if group.valid is None else group.valid  # [G]


# ---- what a completion was worth, compared with what could be expected ----


@dataclass(frozen=True)
class Outcomes:
    """The earnings of a rollout.

    Example:
        `group_normalized(Outcomes(rewards=torch.tensor([[1.0, 0.0]]), valid=torch.ones(1, 2, dtype=torch.bool),
        lengths=torch.tensor([5, 7])))` is about [[0.71, -0.71]].
    """

    rewards: Tensor
    """[P, G]"""
    valid: Tensor
    """[P, G] bool"""
    lengths: Tensor
    """[C] tokens of each completion; 0 is allowed."""
    kl_penalty: Tensor | None = None
    """[N] kl_coef * estimate, to be taken off the reward of each token."""
    baseline: Tensor | None = None
    """[P] reward of a greedy completion."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Name of each part of the reward -> [P, G] as it is before it is weighted, NaN where it does not apply."""
    part_weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Likewise [P], its weight in each group."""
    gradient_norms: Tensor | None = None
    """[N] squared norm of the gradient of each token's log-probability with respect to its logits."""
    all_reduce: AllReduce = single_rank
    """Sums over ranks, for the statistics of the whole batch."""
    task_deviations: Tensor | None = None
    """[P] of all rewards of the group's task so far, this rollout's included: for advantages with a `task_decay`."""

    @cached_property
    def returns(self) -> Tensor:
        """[P, G] float64: reward minus the KL penalty of the completion's tokens; 0 where not valid."""
        returns = self.rewards.double()
        if self.kl_penalty is not None:
            spent = self._spent_before(self.kl_penalty)
            ends = self.lengths.cumsum(0)  # [C]
            returns = returns - (spent[ends] - spent[ends - self.lengths]).view_as(returns)
        return returns.where(self.valid, 0.0)

    @cached_property
    def returns_to_go(self) -> Tensor:
        """[N] float64: sum over s >= t of r_s - penalty_s, r_s the reward on the last token; 0 where not valid."""
        returns = self.per_token(self.rewards.double().where(self.valid, 0.0))
        if self.kl_penalty is None:
            return returns
        spent = self._spent_before(self.kl_penalty)
        at_end = self.per_token(spent[self.lengths.cumsum(0)])
        return returns - (at_end - spent[:-1])

    def per_token(self, values: Tensor) -> Tensor:
        """[N]: each token gets the value of its completion. `values` is [P, G] or [C]."""
        return values.flatten().repeat_interleave(self.lengths)

    def sum_so_far(self, values: Tensor) -> Tensor:
        """[N] float64 sum of [N] values over each token and those before it in its completion; 0 where not valid."""
        before = self._spent_before(values)
        starts = self.lengths.cumsum(0) - self.lengths  # [C]
        return before[1:] - self.per_token(before[starts])

    def _spent_before(self, penalty: Tensor) -> Tensor:
        """[N + 1] penalty of all tokens before each one, over all completions; `penalty` is [N]."""
        penalty = penalty.double().where(self.per_token(self.valid), 0.0)
        return torch.cat([penalty.new_zeros(1), penalty.cumsum(0)])


def raw(outcomes: Outcomes) -> Tensor:
    """A = r: REINFORCE without baseline (Williams 1992; for language models arXiv:2402.14740). [P, G]."""
    return outcomes.returns


def no_advantage(outcomes: Outcomes) -> Tensor:
    """A = 0: rewards are measured and teach nothing, for a teacher alone to do so (`model.distillation`). [P, G]."""
    return torch.zeros_like(outcomes.returns)


@needs(groups=True)
def group_centered(outcomes: Outcomes) -> Tensor:
    """A = r - mean(r of the group): Dr.GRPO, arXiv:2503.20783, which leaves the division by the deviation out. [P, G].

    (G - 1) / G times `leave_one_out`.
    """
    returns = outcomes.returns
    num_valid = outcomes.valid.sum(1, keepdim=True)  # [P, 1]
    mean = returns.sum(1, keepdim=True) / num_valid.clamp(min=1)  # [P, 1]
    return (returns - mean).where(outcomes.valid, 0.0)


@needs(groups=True)
def group_centered_rescaled(outcomes: Outcomes) -> Tensor:
    """A = alpha (r - mean(r of the group)): GPG, arXiv:2504.02546, whose F_norm is 1. [P, G].

    alpha is the number of completions over that of completions in groups whose rewards differ, on all ranks: groups
    without a signal then do not make the step smaller. (verl divides by the number of completions whose reward is not
    0, which is another one: wrong answers beside right ones have a gradient.)
    """
    valid = outcomes.valid
    lowest = outcomes.returns.where(valid, math.inf).amin(1, keepdim=True)  # [P, 1]
    highest = outcomes.returns.where(valid, -math.inf).amax(1, keepdim=True)
    with_signal = valid & (highest > lowest)  # [P, G]
    counts = torch.stack([valid.double().sum(), with_signal.double().sum()])
    count, num_with_signal = outcomes.all_reduce(counts)
    return group_centered(outcomes) * count / num_with_signal.clamp(min=1)


@needs(groups=True)
def group_normalized(outcomes: Outcomes, eps: float = 1e-6) -> Tensor:
    """A = (r - mean(r)) / (std(r) + eps) in each group: GRPO, arXiv:2402.03300, sec. 4.1.2. [P, G].

    The deviation is the unbiased one (divided by G - 1), as in TRL, verl and their kin; eps is verl's (TRL has 1e-4).
    A group with equal rewards, or with one valid completion, gets exact zeros.
    """
    centered = group_centered(outcomes)
    num_valid = outcomes.valid.sum(1, keepdim=True)  # [P, 1]
    variance = centered.square().sum(1, keepdim=True) / (num_valid - 1).clamp(min=1)  # [P, 1]
    return centered / (variance.sqrt() + eps)


@needs(groups=True)
def group_centered_global_std(outcomes: Outcomes, eps: float = 1e-4) -> Tensor:
    """A = (r - mean(r of the group)) / (std(all rewards of the rollout) + eps): Flow-GRPO's `global_std`. [P, G].

    The deviation is that of the rewards themselves, over all groups of all ranks, divided by their number, and eps is
    the released code's. Groups whose rewards hardly differ are not blown up: 0.01 of noise among equal pictures stays
    0.01 of the spread of the rollout. A group with equal rewards gets exact zeros. Lite PPO, arXiv:2508.08221, too
    (`scale_rewards: batch` of TRL and ms-swift, which divide by the unbiased deviation, sqrt(n / (n - 1)) larger for n
    completions).
    """
    valid = outcomes.valid
    returns = outcomes.returns
    count, total = outcomes.all_reduce(torch.stack([valid.double().sum(), returns.sum()]))
    deviations = (returns - total / count.clamp(min=1)).where(valid, 0.0)
    variance = outcomes.all_reduce(deviations.square().sum()) / count.clamp(min=1)
    return group_centered(outcomes) / (variance.sqrt() + eps)


@needs(groups=True)
def leave_one_out(outcomes: Outcomes) -> Tensor:
    """A_i = r_i - mean(r_j, j != i): RLOO, arXiv:2402.14740, written as (r_i - mean(r)) * G / (G - 1). [P, G]."""
    num_valid = outcomes.valid.sum(1, keepdim=True)  # [P, 1]
    return group_centered(outcomes) * num_valid / (num_valid - 1).clamp(min=1)


@needs(greedy_baseline=True)
def greedy_centered(outcomes: Outcomes) -> Tensor:
    """A = r - r(greedy completion of the same prompt): ReMax, arXiv:2310.10505, algorithm 1. [P, G].

    Raises:
        ValueError: the groups have no greedy reward.
    """
    if outcomes.baseline is None:
        raise ValueError(
            "greedy_centered needs the reward of a greedy completion of every prompt, got none; "
            "set model.algorithm.greedy_baseline to true"
        )
    return (outcomes.returns - outcomes.baseline.double()[:, None]).where(outcomes.valid, 0.0)


def batch_normalized(outcomes: Outcomes) -> Tensor:
    """A_t = whiten(sum over s >= t of r_s - penalty_s): REINFORCE++, arXiv:2501.03262, gamma = 1. [N].

    The reward arrives with the last token, so A_t = r - (penalty from t on), whitened over all valid tokens of all
    ranks, which makes long completions count for more in mean and deviation (as in verl and OpenRLHF).
    """
    return _whiten(outcomes.returns_to_go, outcomes)


@needs(groups=True)
def group_centered_batch_normalized(outcomes: Outcomes) -> Tensor:
    """A = whiten(r - mean(r of the group)): REINFORCE++-baseline, arXiv:2501.03262. [N].

    Whitened over the valid tokens of all ranks (verl, OpenRLHF; ms-swift divides by the deviation over completions).
    The mean over TOKENS need not be zero, so a group with equal rewards gets a small constant rather than zero.
    """
    return _whiten(outcomes.per_token(group_centered(outcomes)), outcomes)


def _whiten(values: Tensor, outcomes: Outcomes, eps: float = 1e-8) -> Tensor:
    """[N] (values - mean) / (std + eps) over the valid tokens of all ranks; std divides by their number.

    `values` are 0 where not valid, as `returns_to_go` and `group_centered` leave them.
    """
    valid = outcomes.per_token(outcomes.valid)
    count, total = outcomes.all_reduce(torch.stack([valid.double().sum(), values.sum()]))
    centered = (values - total / count.clamp(min=1)).where(valid, 0.0)
    variance = outcomes.all_reduce(centered.square().sum()) / count.clamp(min=1)
    return centered / (variance.sqrt() + eps)
