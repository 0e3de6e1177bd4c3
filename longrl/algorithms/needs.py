"""Needs of an algorithm's functions: said where a function is defined, checked by `Algorithm.validate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Needs:
    """The needs of one function; the defaults are none. A callable class has them as its attribute `needs`.

    A reference policy is no need: `kl` alone is given one, and there is one whenever `kl_coef` is above 0.
    """

    groups: bool = False
    """Two or more completions of a prompt, for it compares them."""
    greedy_baseline: bool = False
    """The reward of a greedy completion of every prompt."""
    one_update: bool = False
    """Samples of the weights that it updates, for it has no importance ratio: one optimizer step per rollout, a
    `rollout.max_staleness` of 0, and no selection that leaves groups to a later step."""
    kl_in_reward: bool = False
    """`kl_placement: reward`, for as a term of the loss it has no effect."""
    full_distribution: bool = False
    """Sampling without top_p and top_k, for it leaves groups to a later step, whose log-probabilities are then those
    of the filtered distribution."""
    importance_ratio: bool = False
    """Of a KL estimator: that its estimates are multiplied by policy / old policy, with gradient."""
    rows: Literal["any", "tokens", "denoising steps"] = "any"
    """The rows it can read. A correction that does not say so reads tokens alone."""
    noise_rate: bool = False
    """Means in units of std / sqrt(length), the noise's rate, in place of the step's deviation."""
    max_completion_tokens: int | None = None
    """The sampling limit that it was set up for."""
    over_completion: bool = False
    """One ratio for all tokens of a completion, made of theirs."""
    geometric: bool = False
    """Of such a ratio: it is their geometric mean, whose size does not grow with the completion."""
    mask: bool = False
    """Of a correction: its factors are 0 or 1, and weigh no policy against another."""
    reward_parts: bool = False
    """The parts of the reward and their weights, for it looks at each; a KL penalty that is taken off the reward would
    be no part."""
    stale_tokens: bool = False
    """Tokens that older weights drew, without which it has no effect."""
    gradient_norms: bool = False
    """Squared norms of each token's gradient (longrl/modules/token_statistics.py)."""
    task_decay: float | None = None
    """Of an advantage: that it reads how far the rewards of each task have spread, and the share of the averages that
    a rollout leaves."""


NO_NEEDS = Needs()
"""Of a function that says nothing."""


def needs(
    *,
    groups: bool = False,
    greedy_baseline: bool = False,
    one_update: bool = False,
    kl_in_reward: bool = False,
    full_distribution: bool = False,
    importance_ratio: bool = False,
    rows: Literal["any", "tokens", "denoising steps"] = "any",
    noise_rate: bool = False,
    over_completion: bool = False,
    geometric: bool = False,
    mask: bool = False,
    reward_parts: bool = False,
    stale_tokens: bool = False,
    gradient_norms: bool = False,
) -> Callable[[Function], Function]:
    """Marks a function with the `Needs` that the arguments name.

    Example:
        ```python
        @needs(groups=True)
        def best_of_group(outcomes: Outcomes) -> Tensor:
            return (outcomes.rewards == outcomes.rewards.amax(1, keepdim=True)).double()
        ```
    """
    declared = Needs(
        groups,
        greedy_baseline,
        one_update,
        kl_in_reward,
        full_distribution,
        importance_ratio,
        rows,
        noise_rate,
        over_completion=over_completion,
        geometric=geometric,
        mask=mask,
        reward_parts=reward_parts,
        stale_tokens=stale_tokens,
        gradient_norms=gradient_norms,
    )

    def mark(function: Function) -> Function:
        vars(function)["needs"] = declared
        return function

    return mark
