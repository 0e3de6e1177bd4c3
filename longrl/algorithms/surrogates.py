"""What does the loss of a token look like, given its advantage?

With rho = policy / old policy at a token, A its advantage and sg stop-gradient. A surrogate is
`(tokens, clip_low, clip_high) -> TokenLosses`. On the first update after a rollout rho is 1, nothing is clipped, and
the gradient of every surrogate here is that of `reinforce`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.algorithms.tokens import Tokens


@dataclass(frozen=True)
class TokenLosses:
    """Loss of each token, and where the clip was at work."""

    loss: Tensor
    """[R] to be minimised."""
    clipped_low: Tensor
    """[R] bool: the ratio was below the range, and clipping changed the gradient."""
    clipped_high: Tensor
    """[R] bool: likewise above."""


def clipped(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """L = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): PPO, arXiv:1707.06347, eq. 7, and GRPO.

    Two bounds are the clip-higher of DAPO, arXiv:2503.14476, sec. 3.1.
    """
    return _pessimistic(tokens.ratio, tokens.advantages, clip_low, clip_high)


@dataclass(frozen=True)
class DualClipped:
    """Dual-clip PPO, arXiv:1912.09729: for A < 0 the objective is max(min(rho A, clip(rho) A), c A), c = 3.

    So a bad token of a far too high ratio gets no gradient (counted in `clipped_high`); for A >= 0 this is `clipped`.
    TRL's `delta` is another thing: it caps rho for both signs.
    """

    bound: float = 3.0
    """c, above 1."""

    def __post_init__(self) -> None:
        if not self.bound > 1:
            raise ValueError(f"the bound of DualClipped must be above 1, got {self.bound}; the paper has 3")

    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
        """The loss of each token."""
        plain, advantages = clipped(tokens, clip_low, clip_high), tokens.advantages
        capped = torch.minimum(plain.loss, -self.bound * advantages)
        return TokenLosses(
            torch.where(advantages < 0, capped, plain.loss),
            plain.clipped_low,
            plain.clipped_high | ((advantages < 0) & (tokens.ratio > self.bound)),
        )


def sequence_clipped(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """GSPO, arXiv:2507.18071: L = -min(s A, clip(s) A), s = exp(mean over the completion of log rho).

    In the stop-gradient form of its sec. 4.3 (GSPO-token): each token has s_t = sg(s) * policy / sg(policy), whose
    value is s. Where the tokens of a completion share advantage and weight, value and gradient equal those of plain
    GSPO; where they do not, each token keeps its own. A completion is kept or clipped as a whole. Meant for
    `sequence_mean`: under other weights a sequence counts by its length.
    """
    log_s = tokens.completion_mean(tokens.log_ratio.detach())
    ratio = (log_s + tokens.logp - tokens.logp.detach()).exp()
    return _pessimistic(ratio, tokens.advantages, clip_low, clip_high)


def cispo(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """L = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log policy: CISPO, MiniMax-M1, arXiv:2506.13585.

    No token loses its gradient; whatever the sign of A, its weight is held in the range. Both sides are clamped, as in
    the paper's formula, verl and EasyR1; the paper then gives up the lower side, which is `clip_low: 1.0` here and the
    only form TRL and ms-swift have. Mind that their `epsilon_high` is the bound itself: 5 there is `clip_high: 4` here.
    """
    ratio = tokens.ratio.detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLosses(-weight * tokens.advantages * tokens.logp, ratio < 1 - clip_low, ratio > 1 + clip_high)


def grpo_guard(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """`clipped` with the ratio and the weights of GRPO-Guard, arXiv:2510.22319: for denoising steps alone.

        rho = exp((log policy - log old policy + |mean - old mean|^2 / (2 std^2)) * std),    L = clipped(rho) / length

    The sampler's log-ratio has a mean below 0, lower at steps of small std, so that one clip range holds back bad
    samples and lets good ones run away. The added term centres it, and the factor gives all steps the same spread: what
    is left is the average of eps * (mean - old mean). Dividing by the step's length balances their gradients.

    Raises:
        ValueError: the rows are tokens.
    """
    steps = tokens.steps
    if steps is None:
        raise ValueError(
            "grpo_guard is for denoising steps, got tokens; set model.algorithm.surrogate to longrl.algorithms.clipped"
        )
    centred = (tokens.logp - tokens.old_logp + steps.moved) * steps.std
    found = _pessimistic(centred.exp(), tokens.advantages, clip_low, clip_high)
    return TokenLosses(found.loss / steps.length, found.clipped_low, found.clipped_high)


def reinforce(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """L = -A log policy: REINFORCE (Williams 1992), RLOO and ReMax; no ratio, so it is for one update per rollout."""
    never = torch.zeros_like(tokens.advantages, dtype=torch.bool)
    return TokenLosses(-tokens.advantages * tokens.logp, never, never)


def _pessimistic(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> TokenLosses:
    """The lower of the clipped and the unclipped objective."""
    low, high = 1 - clip_low, 1 + clip_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return TokenLosses(-objective, (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high))
