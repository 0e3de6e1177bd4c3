"""GRPO-CARE's consistency: of right completions those earn more whose reasoning makes their answer likely.

arXiv:2506.16141, sec. 4.2: the reference's likelihood of the answer, given prompt and reasoning, against that of the
other right completions of the group. The reference may stand still or follow the policy slowly.

Letters: P groups, G completions of each, C = P * G, N tokens of all of them, completion after completion.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from longrl.io.number_ranges import LEAST, NOT_NEGATIVE, Range, check_ranges
from longrl.modules.mini_batches import FlatGroups
from longrl.rewards.answers import answer_place
from longrl.rewards.reward_sum import ACCURACY_NAME
from longrl.strategies.axis import Axis
from longrl.types import Completion, Metrics, to_device

ABOVE_0: Range = (LEAST, 1)
PART = "consistency"
"""The bonus among the parts of the reward, for advantages that look at each."""
RIGHT_ABOVE = 0.1
"""A completion is right if its accuracy is above it, and not below its group's mean, as in the authors' code."""


@dataclass(frozen=True)
class Consistency:
    """The bonus of right completions whose answer the reference finds likely after their reasoning.

    With s the geometric mean of the reference's probabilities of the tokens within `<answer>`, at most `most`, a right
    completion of accuracy a earns bonus * a if s >= (mean of s over the right ones of its group) - margin. Where the
    answer's tokens cannot be found, a completion earns none and enters no mean. It is added to the rewards before
    advantages, behind selections. The defaults are the authors' script.

    Example:
        `Consistency(bonus=0.5, margin=0.01, most=0.95)` with `Algorithm(kl_coef=0.0)` is the paper's.
    """

    bonus: float = 0.5
    """Added to the reward of a right and consistent completion, times its accuracy."""
    margin: float = 0.01
    """So much below the mean is as good."""
    most: float = 0.95
    """Likelihoods above count as this: of certain answers none is better."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.consistency.", bonus=NOT_NEGATIVE, margin=NOT_NEGATIVE, most=ABOVE_0)

    def score(self, flat: FlatGroups, ref_logp: Tensor, tokenizer: Any) -> ConsistentGroups:
        """The groups with the bonus in their rewards.

        Args:
            flat: of a rollout.
            ref_logp: [N] of the reference.
            tokenizer: of the completions.
        """
        device = flat.rewards.device
        samples = [completion for group in flat.groups for completion in group.completions]
        index, in_answer = answer_tokens(tokenizer, samples)
        accuracy = [group.reward_parts[ACCURACY_NAME] for group in flat.groups]
        known = to_device(torch.cat([torch.zeros(0), *accuracy]), device).view_as(flat.rewards)  # [P, G]
        index, in_answer = to_device(index, device), to_device(in_answer, device)
        likelihood = answer_likelihood(ref_logp, index, in_answer, len(samples))
        likelihood = likelihood.view_as(flat.rewards)
        right = right_completions(known, flat.valid)
        earned = consistency_bonus(known, right, likelihood, margin=self.margin, most=self.most)
        weight = torch.full((len(flat.groups),), self.bonus, dtype=torch.float64, device=device)
        rewarded = replace(
            flat,
            rewards=flat.rewards + self.bonus * earned,
            parts={**flat.parts, PART: earned},
            part_weights={**flat.part_weights, PART: weight},
        )
        return ConsistentGroups(rewarded, right, likelihood, earned)

    def check_parts(self, names: Sequence[str]) -> None:
        """Raises ValueError if the reward does not say which completions are right.

        Args:
            names: of the reward's parts.
        """
        if PART in names:
            raise ValueError(
                f"model.consistency adds a part {PART!r} to the reward, which has one of that name; name it otherwise"
            )
        if ACCURACY_NAME not in names:
            raise ValueError(
                f"model.consistency compares completions that the part {ACCURACY_NAME!r} of the reward calls right, "
                f"got {', '.join(names)}; name the part so, or set model.consistency to null"
            )


@dataclass(frozen=True)
class ConsistentGroups:
    """Groups with the bonus in their rewards, and what it came from."""

    flat: FlatGroups
    right: Tensor
    """[P, G] bool."""
    likelihood: Tensor
    """[P, G] of the answers, NaN where none was found."""
    earned: Tensor
    """[P, G] accuracy of those that earned the bonus, 0 of others."""

    def metrics(self, dp: Axis) -> Metrics:
        """Means over the right completions of all ranks; every rank must call it, and a GPU is waited for."""
        found = self.right & self.likelihood.isfinite()
        sums = {
            "right": float(self.right.sum()),
            "found": float(found.sum()),
            "earned": float((self.earned > 0).sum()),
            "likelihood": float(self.likelihood.where(found, 0.0).sum()),
        }
        total = dp.sum_dict(sums)
        return {
            "answer_likelihood": total["likelihood"] / total["found"] if total["found"] else float("nan"),
            "consistent_share": total["earned"] / total["right"] if total["right"] else float("nan"),
        }


def right_completions(accuracy: Tensor, valid: Tensor) -> Tensor:
    """[P, G] bool: completions that are right, and no worse than their group's mean.

    Args:
        accuracy: [P, G], NaN where it does not apply.
        valid: [P, G] bool.
    """
    known = valid & ~accuracy.isnan()
    values = accuracy.where(known, 0.0)
    mean = values.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return known & (values > RIGHT_ABOVE) & (values >= mean)


def consistency_bonus(accuracy: Tensor, right: Tensor, likelihood: Tensor, *, margin: float, most: float) -> Tensor:
    """[P, G] accuracy of the completions that earn the bonus, 0 of the others.

    Args:
        accuracy: [P, G].
        right: [P, G] bool.
        likelihood: [P, G] of the answers, not finite where there is none to compare.
        margin: below the mean of the right ones.
        most: that a likelihood counts as.
    """
    compared = right & likelihood.isfinite()
    bounded = likelihood.clamp(max=most).where(compared, 0.0)
    mean = bounded.sum(1, keepdim=True) / compared.sum(1, keepdim=True).clamp(min=1)
    return accuracy.where(compared & (bounded >= mean - margin), 0.0)


# ---- the tokens of the answer ----


def answer_likelihood(logp: Tensor, index: Tensor, in_answer: Tensor, num_completions: int) -> Tensor:
    """[C] geometric means of the probabilities of the answers' tokens, NaN where there are none.

    Args:
        logp: [N].
        index: [N] the completion of each token.
        in_answer: [N] bool.
        num_completions: C.
    """
    weights = in_answer.to(logp.dtype)
    sums = logp.new_zeros(num_completions).index_add(0, index, logp.where(in_answer, 0.0))
    counts = logp.new_zeros(num_completions).index_add(0, index, weights)
    return (sums / counts).exp()


def answer_tokens(tokenizer: Any, completions: Sequence[Completion]) -> tuple[Tensor, Tensor]:
    """For every sampled token the completion that it is of, and whether it spells the answer: [N] and [N] bool."""
    indices = []
    masks = []
    for number, completion in enumerate(completions):
        sampled = completion.token_ids if completion.sampled is None else completion.token_ids[completion.sampled]
        mask = torch.zeros(len(sampled), dtype=torch.bool)
        span = answer_span(tokenizer, sampled.tolist())
        if span is not None:
            mask[slice(*span)] = True
        masks.append(mask)
        indices.append(torch.full((len(sampled),), number))
    return torch.cat([torch.zeros(0, dtype=torch.int64), *indices]), torch.cat([torch.zeros(0).bool(), *masks])


def answer_span(tokenizer: Any, ids: list[int]) -> tuple[int, int] | None:
    """Where the tokens of the last `<answer>` begin and end among the sampled ones; None where they cannot be told.

    Sampled tokens need not be those that the text would be cut into, so their own prefixes are decoded: by halving, the
    first token that reaches into the answer, and the first that completes it. A token that also spells a part of a tag
    counts.
    """

    def decode(start: int, stop: int) -> str:
        text: str = tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    text = decode(0, len(ids))
    place = answer_place(text)
    if place is None:
        return None
    counts = range(len(ids) + 1)
    first = bisect.bisect_right(counts, place[0], key=lambda count: len(decode(0, count))) - 1
    stop = bisect.bisect_left(counts, place[1], key=lambda count: len(decode(0, count)))
    # A prefix that ends within a character may be decoded longer than it is.
    return (first, stop) if text[slice(*place)] in decode(first, stop) else None
