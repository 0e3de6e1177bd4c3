"""The loss of pairs over a micro-batch, whose answers lie packed behind their prompt, and the mean reward of a run.

Letters: P pairs of this rank, N tokens of their 2 P answers, chosen and rejected in turn; R scored rows of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algorithms import LossOutput
from longrl.algorithms.preferences import PairScores, Preference
from longrl.modules.mini_batches import TokenLoss
from longrl.types import Continuation, Packed, PolicyOutput, to_device


@dataclass(frozen=True)
class PreferenceLoss(TokenLoss):
    """The objective on the pairs of an optimizer step: a `TokenLoss`; `of_pairs` makes one.

    Its values add up over micro-batches to means over all pairs of the step, whatever the split: a pair is in one.
    """

    objective: Preference
    lengths: Tensor
    """[2 P] int64 sampled tokens of each answer."""
    ref_logp: Tensor | None
    """[N] under the reference policy, or None without one."""
    ref_sums: Tensor
    """[2 P] float64 sums of the same over each answer; zeros without a reference."""
    num_pairs: int
    """Of all ranks."""
    shift: float = 0.0
    """Reward shift of the quality loss."""

    @classmethod
    def of_pairs(
        cls,
        objective: Preference,
        pairs: Sequence[Sequence[Continuation]],
        ref_logp: Tensor | None,
        num_pairs: int,
        shift: float,
        device: torch.device,
    ) -> PreferenceLoss:
        """The loss of these P pairs.

        Args:
            objective: of the run.
            pairs: two answers of each.
            ref_logp: [N] of their tokens under the reference.
            num_pairs: of all ranks.
            shift: mean reward of the steps before.
            device: of all tensors.
        """
        lengths = torch.tensor([answer.num_sampled for pair in pairs for answer in pair], dtype=torch.int64)
        sums = torch.zeros(len(lengths), dtype=torch.float64, device=device)
        if ref_logp is not None:
            sums = sums.index_add(0, token_answers(pairs, device), ref_logp.double())
        return cls(objective, to_device(lengths, device), ref_logp, sums, num_pairs, shift)

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        check_whole(packed)
        index = packed.completion_index
        # Every pair of the step has a place; those that are not here weigh nothing.
        is_here = self.sums(torch.ones_like(output.logp), index)[::2] > 0  # [P]
        weights = is_here / self.num_pairs
        loss, values = self.of_sums(self.sums(output.logp, index))
        entropy = self.sums(output.entropy, index) / self.lengths  # [2 P]
        values["entropy"] = entropy.view(-1, 2).mean(1)
        metrics = {name: (weights * each.detach()).sum() for name, each in values.items()}
        return LossOutput((weights * loss).sum(), metrics)

    def of_sums(self, logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair and what is logged of it, [P] each.

        Args:
            logp: [2 P] float64 log-probability of each answer under the policy.
        """
        pairs = PairScores(
            chosen_logp=logp[::2],
            rejected_logp=logp[1::2],
            chosen_ref=self.ref_sums[::2],
            rejected_ref=self.ref_sums[1::2],
            chosen_tokens=self.lengths[::2],
            rejected_tokens=self.lengths[1::2],
        )
        parts = self.objective.losses(pairs, self.shift)
        loss = torch.zeros_like(pairs.chosen_logp)
        for name, part in parts.items():
            loss = loss + self.objective.weight(name) * part
        chosen, rejected = self.objective.rewards(pairs)
        values = {
            "preference_accuracy": (chosen > rejected).double(),
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "logp_chosen": pairs.chosen_logp,
            "logp_rejected": pairs.rejected_logp,
        }
        return loss, values | {f"loss_{name}": part for name, part in parts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """See `TokenLoss`."""
        known = {"reward_shift": torch.tensor([self.shift], dtype=torch.float64)}
        if self.ref_logp is not None:
            known["ref_logp"] = self.ref_logp
        return known

    def sums(self, values: Tensor, index: Tensor) -> Tensor:
        """[2 P] float64 sums of values [R] by the answer that a row belongs to."""
        # float64: the order in which a GPU adds does not show after rounding
        return torch.zeros_like(self.ref_sums).index_add(0, index, values.double())


def token_answers(pairs: Sequence[Sequence[Continuation]], device: torch.device) -> Tensor:
    """[N] which of the 2 P answers each of their sampled tokens belongs to."""
    lengths = torch.tensor([answer.num_sampled for pair in pairs for answer in pair], dtype=torch.int64)
    return to_device(torch.arange(len(lengths)).repeat_interleave(lengths), device)


def check_whole(packed: Packed) -> None:
    """Raises ValueError if a micro-batch has one answer of a pair without the other."""
    sizes = [len(span.completion_tokens) for span in packed.spans]
    if any(size != 2 for size in sizes):
        raise ValueError(
            f"both answers of a pair must lie in one micro-batch, got groups of {sizes}; raise "
            "model.max_tokens_per_micro_batch to the tokens of the longest prompt with both its answers"
        )


@dataclass
class RewardShift:
    """The mean reward of all answers of the steps so far: delta of the quality loss (MPO, arXiv:2411.10442, eq. 7).

    A step is shifted by the mean of the steps before it, so that no split into micro-batches or ranks changes it. TRL's
    running mean also counts the step's own rewards. In checkpoints, the same on all ranks.
    """

    total: float = 0.0
    count: float = 0.0

    @property
    def mean(self) -> float:
        """0 before the first step, where policy and reference are one."""
        return self.total / self.count if self.count else 0.0

    def add(self, mean: float, count: float) -> None:
        """Counts the rewards of a step."""
        self.total += mean * count
        self.count += count

    def state_dict(self) -> dict[str, float]:
        """For checkpoints."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """The inverse; checkpoints of other stages have none."""
        self.total = state.get("total", 0.0)
        self.count = state.get("count", 0.0)
