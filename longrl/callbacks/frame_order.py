"""T-GRPO: beside each group a smaller one is sampled with shuffled frames, and what order is needed for earns a bonus.

Video-R1, arXiv:2503.21776, sec. 3.2. Groups with shuffled frames are compared with and never trained on. Nothing is
encoded for them: the rows of the videos' features are moved (longrl/models/cell_order.py).

Letters: G completions of a prompt, K of the same with shuffled frames.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longrl.algorithms import group_normalized
from longrl.engines.rollout_engine import RolloutRequest
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, check_ranges
from longrl.models.base import CausalFamily
from longrl.models.cell_order import shuffled_prompt
from longrl.modules.policy import PolicyModule
from longrl.rewards import RewardSum
from longrl.rewards.reward_sum import ACCURACY_NAME
from longrl.types import Group, Media, Row, SamplingParams

logger = logging.getLogger(__name__)

PART = "order"
"""The bonus among the parts of the reward: 1 for a completion that has earned it."""
RIGHT_ABOVE = 0.1
"""A completion is right if its accuracy is above it, as in Video-R1's code: judgements by degrees count, too."""


@dataclass(frozen=True)
class FrameOrder:
    """The bonus of right completions to a video whose order helps: `rollout.frame_order`.

    A prompt with a video is sampled some times more with the temporal patches of its videos shuffled. With p the mean
    accuracy of its group and q that of the shuffled completions, the right completions of the group earn the bonus if
    p >= ratio * q. Prompts without a video of two temporal patches have no such part.

    Example:
        `FrameOrder(num_generations=4, bonus=0.3, ratio=0.8)` is the paper's for groups of 8.
    """

    num_generations: int | None = None
    """Completions with shuffled frames; None is half of those in order."""
    bonus: float = 0.3
    """Added to the reward: the paper's alpha. Advantages that divide by a group's deviation take it out again, unless
    other parts of the reward differ within the group."""
    ratio: float = 0.8
    """The paper's mu. Below 1 right completions earn the bonus also where order makes no difference; above 1 it must
    help by so much."""
    categories: list[str] | None = None
    """Of rows (`Row.category`) to which it applies; None is all."""

    def __post_init__(self) -> None:
        check_ranges(
            self, "rollout.frame_order.", num_generations=COUNT, bonus=NOT_NEGATIVE, ratio=NOT_NEGATIVE
        )  # fmt: skip

    def shuffled_request(
        self, family: CausalFamily, request: RolloutRequest, sampling: SamplingParams
    ) -> RolloutRequest:
        """The request with its prompts once more, those that have frames to be shuffled.

        Their order follows from the rollout's seed and the prompt's id, as its completions do.

        Args:
            family: that rendered the prompts.
            request: of the rollout, its seed included.
            sampling: of completions in order.
        """
        prompts = []
        engine_prompts = []
        indices = []
        for index, prompt in enumerate(request.engine_prompts):
            if self.categories is not None and prompt.row.category not in self.categories:
                continue
            shuffled = shuffled_prompt(family, prompt, f"{request.seed}/{prompt.id}")
            if shuffled is not None:
                prompts.append(shuffled)
                engine_prompts.append(replace(shuffled, id=f"{prompt.id} (shuffled)"))
                indices.append(index)
        count = self.num_generations or max(1, sampling.num_generations // 2)
        samplings = [replace(sampling, num_generations=count)]
        further = RolloutRequest(prompts, engine_prompts, samplings, request.seed)
        return replace(request, shuffled=further, shuffled_of=indices)

    def add_bonus(self, groups: Sequence[Group]) -> None:
        """Adds the bonus to the rewards of groups, and the part `order` to their parts; NaN where it does not apply."""
        for group in groups:
            earned = torch.full_like(group.rewards, torch.nan)  # [G]
            if group.shuffled_accuracy is not None:
                accuracy = group.reward_parts[ACCURACY_NAME]
                earned = order_bonus(accuracy, group.valid, group.shuffled_accuracy, self.ratio)
            group.reward_parts[PART] = earned
            group.part_weights = {**(group.part_weights or {}), PART: self.bonus}
            group.rewards = group.rewards + self.bonus * earned.nan_to_num(nan=0.0).where(group.valid, 0.0)


def order_bonus(accuracy: Tensor, valid: Tensor, shuffled: Tensor, ratio: float) -> Tensor:
    """Which completions of a group earn the bonus: arXiv:2503.21776, eq. 2 and 3.

    Args:
        accuracy: [G] of the completions with frames in order, NaN where it does not apply.
        valid: [G] bool, which of them could be judged.
        shuffled: [K] accuracy of those with shuffled frames that could be judged.
        ratio: p >= ratio * q earns it.

    Returns:
        [G] 1.0 or 0.0, all NaN where one of the two groups has no accuracy.
    """
    known = valid & ~accuracy.isnan()
    if not known.any() or not len(shuffled):
        return torch.full_like(accuracy, torch.nan)
    helps = accuracy[known].mean() >= ratio * shuffled.mean()
    return (known & helps & (accuracy > RIGHT_ABOVE)).to(accuracy.dtype)


def shuffled_media(request: RolloutRequest) -> list[Media]:
    """The videos of a request whose cells are in another order."""
    prompts = [] if request.shuffled is None else request.shuffled.prompts
    return [item for prompt in prompts for item in prompt.media if item.cell_order]


def check_frame_order(
    order: FrameOrder | None, module: PolicyModule, reward: RewardSum, max_staleness: int, has_turns: bool
) -> None:
    """Raises ValueError where groups with shuffled frames cannot be compared, before weights are loaded.

    Args:
        order: the option `rollout.frame_order`.
        module: whose algorithm uses the rewards.
        reward: the parts of the reward.
        max_staleness: the option `rollout.max_staleness`.
        has_turns: whether an environment answers completions.
    """
    if order is None:
        return
    problem = ""
    if ACCURACY_NAME not in reward.names:
        problem = f"compares the part {ACCURACY_NAME!r} of the reward, got {', '.join(reward.names)}; name the part so"
    elif PART in reward.names:
        problem = f"adds a part {PART!r} to the reward, which has one of that name; name it otherwise"
    elif max_staleness > 1:
        problem = (
            "compares groups that one set of weights has sampled, and with "
            f"rollout.max_staleness={max_staleness} weights change within them; lower that to 1"
        )
    elif has_turns:
        problem = "shuffles the videos of prompts, and tools would show their parts in order; leave the environment out"
    elif module.algorithm.greedy_baseline:
        problem = (
            "adds to the rewards of sampled completions, and the greedy baseline has no such part; set "
            "model.algorithm.greedy_baseline to false"
        )
    if problem:
        raise ValueError(f"rollout.frame_order {problem}, or set rollout.frame_order to null")
    if len(reward.names) == 1 and module.algorithm.advantage is group_normalized:
        logger.warning(
            "rollout.frame_order has next to no effect: all right completions of a group earn the same, and "
            "group_normalized divides by the group's deviation; set model.algorithm.advantage to "
            "longrl.algorithms.group_centered, as configs/algorithm/dr_grpo.yaml has it"
        )


def check_categories(order: FrameOrder | None, rows: Sequence[Row]) -> None:
    """Raises ValueError for a category that no row has: it would compare nothing, without a word.

    Args:
        order: the option `rollout.frame_order`.
        rows: to train on.
    """
    if order is None or order.categories is None:
        return
    known = sorted({row.category for row in rows})
    unknown = [name for name in order.categories if name not in known]
    if unknown or not order.categories:
        raise ValueError(
            f"rollout.frame_order.categories must name categories of data.train, which are {', '.join(known[:20])}, "
            f"got {order.categories}; correct it, or set it to null for all"
        )


def order_values(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Accuracies with frames in order and shuffled, of the groups that have both: [n] and [m] completions."""
    compared = [group for group in groups if group.shuffled_accuracy is not None and len(group.shuffled_accuracy)]
    ordered = []
    for group in compared:
        accuracy = group.reward_parts[ACCURACY_NAME][group.valid]
        ordered.append(accuracy[~accuracy.isnan()])
    shuffled = [group.shuffled_accuracy for group in compared if group.shuffled_accuracy is not None]
    none = torch.zeros(0)
    return {
        "rollout/accuracy_in_order": torch.cat([none, *ordered]),
        "rollout/accuracy_shuffled": torch.cat([none, *shuffled]),
    }
