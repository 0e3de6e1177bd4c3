"""Groups of completions as the flat tensors of an optimizer step.

Letters: P groups, G completions of each, C = P * G, N tokens of all of them, completion after completion.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longrl.algorithms import Algorithm
from longrl.strategies.axis import Axis
from longrl.types import Batch, Group, Prompt


@dataclass(frozen=True)
class Rollout:
    """One mini-batch of scored groups."""

    prompts: list[Prompt]
    completions: list[list[Tensor]]
    advantages: Tensor
    """[N]"""
    old_logp: Tensor | None
    """[N], or None where the policy that sampled is the one being updated."""
    ref_logp: Tensor | None
    """[N], or None without KL in the loss."""
    sampler_logp: Tensor
    """[N] as the engine reported them."""
    fresh: Tensor
    """[N] bool, True for tokens sampled by the weights of this step."""
    weights: Tensor
    """[C] weight of every token of a completion."""


@dataclass(frozen=True)
class FlatGroups:
    """The groups of a step, with what algorithms read of them. A rank may have none while others have some."""

    groups: Sequence[Group]
    device: torch.device

    @property
    def prompts(self) -> list[Prompt]:
        """P prompts."""
        return [group.prompt for group in self.groups]

    @property
    def completions(self) -> list[list[Tensor]]:
        """Token ids of G completions of P prompts."""
        return [[completion.token_ids for completion in group.completions] for group in self.groups]

    @property
    def lengths(self) -> Tensor:
        """[C] tokens of each completion."""
        lengths = [len(completion.logprobs) for group in self.groups for completion in group.completions]
        return torch.tensor(lengths, dtype=torch.int64, device=self.device)

    @property
    def rewards(self) -> Tensor:
        """[P, G] rewards."""
        return self._stack([group.rewards for group in self.groups], torch.float32)

    @property
    def valid(self) -> Tensor:
        """[P, G] bool."""
        return self._stack([group.valid for group in self.groups], torch.bool)

    @property
    def baselines(self) -> Tensor | None:
        """[P] rewards of greedy completions, if the groups have them."""
        if any(group.baseline is None for group in self.groups):
            return None
        return torch.tensor([group.baseline for group in self.groups], dtype=torch.float32, device=self.device)

    @property
    def sampler_logp(self) -> Tensor:
        """[N] log-probabilities the engine reported."""
        parts = [completion.logprobs for group in self.groups for completion in group.completions]
        return torch.cat([torch.zeros(0), *parts]).to(self.device)

    @property
    def fresh(self) -> Tensor:
        """[N] bool, False for tokens of carried-over groups."""
        tokens = torch.tensor(self.offsets).diff()
        known = torch.tensor([not group.carried_over for group in self.groups], dtype=torch.bool)
        return known.repeat_interleave(tokens).to(self.device)

    @property
    def offsets(self) -> list[int]:
        """P + 1 numbers: where each group's tokens begin, and the end."""
        tokens = (sum(len(completion.logprobs) for completion in group.completions) for group in self.groups)
        return list(itertools.accumulate(tokens, initial=0))

    def parts(self, count: int) -> list[slice]:
        """The groups in `count` neighbouring slices whose sizes differ by at most one; there may be empty ones."""
        edges = [len(self.groups) * place // count for place in range(count + 1)]
        return [slice(start, stop) for start, stop in itertools.pairwise(edges)]

    def _stack(self, rows: list[Tensor | None], dtype: torch.dtype) -> Tensor:
        if not rows:
            return torch.zeros(0, 1, dtype=dtype, device=self.device)
        return torch.stack(rows).to(self.device)  # type: ignore[arg-type]  # rewards have been given by now


def mini_batches(
    flat: FlatGroups, count: int, algorithm: Algorithm, data: Axis, old: Tensor | None, reference: Tensor | None
) -> list[Rollout]:
    """The groups of a rollout with their advantages, in mini-batches; every rank of the run must call it.

    Args:
        flat: this rank's groups.
        count: mini-batches, if a rank has as many groups.
        algorithm: the objective.
        data: ranks with other groups.
        old: [N] log-probabilities before the update, or None where it is the first.
        reference: [N] of the reference policy, or None without KL penalty.
    """
    penalty = None
    if reference is not None and algorithm.kl_placement == "reward":
        penalty, reference = algorithm.kl(old, reference), None
    advantages = algorithm.token_advantages(
        flat.rewards, flat.valid, flat.lengths, kl=penalty, baseline=flat.baselines, all_reduce=data.sum
    )
    offsets, sampler = flat.offsets, flat.sampler_logp
    found = []
    for part in flat.parts(min(count, data.max(len(flat.groups)))):
        own, rows = replace(flat, groups=flat.groups[part]), slice(offsets[part.start], offsets[part.stop])
        found.append(
            Rollout(
                prompts=own.prompts,
                completions=own.completions,
                advantages=advantages[rows],
                old_logp=None if old is None else old[rows],
                ref_logp=None if reference is None else reference[rows],
                sampler_logp=sampler[rows],
                fresh=own.fresh,
                weights=algorithm.completion_weights(own.lengths, own.valid.flatten(), data.sum),
            )
        )
    return found


def targets(batch: Batch) -> list[list[Tensor]]:
    """The SFT target of each prompt.

    Raises:
        ValueError: the prompts have none, for they are meant to be answered by a rollout callback.
    """
    found = [prompt.response_ids for prompt in batch.prompts]
    if any(ids is None for ids in found):
        raise ValueError(
            "data.stage=rl gives prompts without targets and there is no rollout callback to answer them; set "
            "rollout.reward (configs/reward/ has examples), or data.stage to sft"
        )
    return [[ids] for ids in found if ids is not None]
