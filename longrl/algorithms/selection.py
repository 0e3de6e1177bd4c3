"""Which groups of a rollout train? A selection is `list[Group] -> list[Group]` and changes none of its groups.

The caller samples more prompts while too few groups are left, and keeps the surplus for the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longrl.types import Group

Selection = Callable[[list[Group]], list[Group]]


def keep_all(groups: list[Group]) -> list[Group]:
    """Every group trains."""
    return groups


def drop_uniform(groups: list[Group]) -> list[Group]:
    """Dynamic sampling: drops groups all right or all wrong. DAPO, arXiv:2503.14476, sec. 3.2: 0 < #right < G.

    Looked at is the reward part `accuracy`, or the reward if there is none, of the valid completions: a group stays if
    it has two that differ. (EasyR1 and Long-RL keep 0.01 < mean < 0.99 of the whole reward, where a format reward lets
    all-wrong groups pass.)
    """
    return [group for group in groups if _has_contrast(group)]


def mask_truncated(groups: list[Group]) -> list[Group]:
    """Overlong filtering: completions cut off by the limit are no longer valid. DAPO, arXiv:2503.14476, sec. 3.4."""
    return [replace(group, valid=_valid(group) & _finished(group)) for group in groups]


@dataclass(frozen=True)
class InOrder:
    """Several selections, each on what the one before left.

    Example:
        `InOrder([mask_truncated, drop_uniform])` looks for contrast among the completions that were not cut off.
    """

    steps: list[Selection]

    def __call__(self, groups: list[Group]) -> list[Group]:
        """The groups that every step lets pass."""
        for step in self.steps:
            groups = step(groups)
        return groups


def _valid(group: Group) -> Tensor:
    return torch.ones(len(group.completions), dtype=torch.bool) if group.valid is None else group.valid  # [G]


def _finished(group: Group) -> Tensor:
    valid = _valid(group)
    return torch.tensor([c.finish_reason != "length" for c in group.completions], dtype=torch.bool, device=valid.device)


def _has_contrast(group: Group) -> bool:
    values = group.reward_parts.get("accuracy", group.rewards)
    assert values is not None, "groups are selected after they were rewarded"
    values = values[_valid(group)]
    return bool((values != values[:1]).any())
