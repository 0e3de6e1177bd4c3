"""Advantages from the parts of a reward, each looked at on its own. Letters: P prompts, G completions of each."""

from __future__ import annotations

import torch
from torch import Tensor

from longrl.algorithms.advantages import Outcomes
from longrl.algorithms.needs import needs

ROUNDING = 1e-4
"""Of rewards, which are float32 sums."""


@needs(groups=True, reward_parts=True)
def part_normalized(outcomes: Outcomes, eps: float = 1e-4) -> Tensor:
    """GDPO, arXiv:2601.05242: every part of the reward is normalised on its own, and their sum over the batch. [P, G].

        S = sum over parts k of w_k (r_k - mean(r_k)) / (std(r_k) + eps),    A = (S - mean(S)) / (std(S) + eps)

    Parts are normalised in their group, S over the valid completions of all ranks. With the reward's sum normalised at
    once, (right, badly written) and (wrong, well written) may be worth the same; here a part with little spread, as a
    format that nearly all keep, counts as its weight says. Deviations are unbiased, and eps is that of the released
    code and of TRL. A part that does not apply (NaN) counts 0 and enters no mean, as in TRL (the released code takes 0
    for its value). mean(S) is 0 whatever the rewards, so that groups with equal parts get exact zeros. S is normalised
    over completions, as in the paper, TRL and the released code for it; that for verl whitens over tokens.

    Raises:
        ValueError: the reward is not the weighted sum of its parts.
    """
    valid = outcomes.valid
    total = torch.zeros_like(outcomes.returns)  # [P, G]
    rest = outcomes.returns  # [P, G] of the reward, what is in no part
    size = rest.abs()  # [P, G] of all that is added up
    for name, values in outcomes.parts.items():
        weight = outcomes.part_weights[name].double()[:, None]  # [P, 1]
        total = total + weight * _normalized(values.double(), valid, eps)
        earned = weight * values.double().nan_to_num(nan=0.0)
        rest = rest - earned
        size = size + earned.abs()
    is_known = rest.abs() <= ROUNDING * (1 + size)
    num_unknown = (valid & ~is_known).double().sum()
    count, squares, unknown = outcomes.all_reduce(
        torch.stack([valid.double().sum(), total.square().sum(), num_unknown])
    )
    if unknown:
        raise ValueError(
            f"part_normalized looks at each part of the reward, and the rewards of {int(unknown)} of {int(count)} "
            "completions are not the sum of theirs: longrl.rewards.RewardSum has not scored them, or something was "
            "added behind it; set model.algorithm.advantage to longrl.algorithms.group_normalized"
        )
    return total / ((squares / (count - 1).clamp(min=1)).sqrt() + eps)


def _normalized(values: Tensor, valid: Tensor, eps: float) -> Tensor:
    """[P, G] (values - mean) / (std + eps) of each group, over those that are valid and apply; 0 elsewhere."""
    counted = valid & values.isfinite()
    values = values.where(counted, 0.0)
    number = counted.sum(1, keepdim=True)  # [P, 1]
    mean = values.sum(1, keepdim=True) / number.clamp(min=1)
    centered = (values - mean).where(counted, 0.0)
    variance = centered.square().sum(1, keepdim=True) / (number - 1).clamp(min=1)
    return centered / (variance.sqrt() + eps)
