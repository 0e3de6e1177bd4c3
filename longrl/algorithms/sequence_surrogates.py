"""Surrogates of a whole completion, whose ratio is a mean over its tokens.

Letters: R tokens of a micro-batch. With rho = policy / old policy at a token, s = exp(mean over the completion of log
rho).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longrl.algorithms.losses import TokenLosses, Tokens, clipped, log_ratio
from longrl.algorithms.needs import Needs, needs
from longrl.io.number_ranges import LEAST, check_ranges


@needs(rows="tokens", over_completion=True, geometric=True)
def sequence_clipped(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """GSPO, arXiv:2507.18071: L = -min(s A, clip(s) A), s = exp(mean over the completion of log rho).

    In the stop-gradient form of its sec. 4.3 (GSPO-token): each token has s_t = sg(s) * policy / sg(policy), whose
    value is s. Where the tokens of a completion share advantage and weight, value and gradient equal those of plain
    GSPO; where they do not, each token keeps its own. A completion is kept or clipped as a whole. For `sequence_mean`:
    under other weights a sequence counts by its length.
    """
    return clipped(tokens, clip_low, clip_high, _sequence_ratio(tokens))


@dataclass(frozen=True)
class SequenceDualClipped:
    """GSPO with the dual clip of arXiv:1912.09729: for A < 0 the objective is max(min(s A, clip(s) A), c A).

    So a bad completion of a far too high s has no gradient, as a token with `DualClipped`. Beyond that log s is held
    at `max_log_ratio`, above which no completion has one (verl has 10); with c below its exp that changes nothing.
    """

    bound: float | None = 3.0
    """c, above 1; None leaves the dual clip out."""
    max_log_ratio: float = 10.0
    """Of s."""

    def __post_init__(self) -> None:
        check_ranges(self, "SequenceDualClipped.", max_log_ratio=(LEAST, 20))
        if self.bound is not None and not self.bound > 1:
            raise ValueError(
                f"the bound of SequenceDualClipped must be above 1, or null for none, got {self.bound}; the paper has 3"
            )

    @property
    def needs(self) -> Needs:
        """Those of `sequence_clipped`."""
        return Needs(rows="tokens", over_completion=True, geometric=True)

    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
        """The loss of each token."""
        ratio = _sequence_ratio(tokens, self.max_log_ratio)
        plain = clipped(tokens, clip_low, clip_high, ratio)
        if self.bound is None:
            return plain
        negative = tokens.advantages < 0  # [R]
        capped = torch.minimum(plain.loss, -self.bound * tokens.advantages)
        clipped_high = plain.clipped_high | (negative & (ratio > self.bound))
        return replace(plain, loss=torch.where(negative, capped, plain.loss), clipped_high=clipped_high)


@needs(rows="tokens", over_completion=True, geometric=True)
def geometric_clipped(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """GMPO, arXiv:2507.20673: L = -A exp(mean over the completion of c), c = log rho clipped token by token.

        c = min(log rho, clip_high) where A > 0,    max(log rho, -clip_low) elsewhere

    The range is one of logs, and wide: the paper's 0.4 is exp(-0.4) to exp(0.4). One outlier moves a geometric mean
    little, so that fewer tokens need be clipped; a clipped one has no gradient, the others go on. In the stop-gradient
    form of `sequence_clipped`: where the tokens of a completion share advantage and weight, value and gradient under
    `sequence_mean` are those of the paper, of verl (`geo_mean`) and of TRL.
    """
    log_rho = log_ratio(tokens.logp, tokens.old_logp)
    positive = tokens.advantages > 0
    clipped_high = positive & (log_rho > clip_high)
    clipped_low = (tokens.advantages < 0) & (log_rho < -clip_low)
    bounded = torch.where(positive, log_rho.clamp(max=clip_high), log_rho.clamp(min=-clip_low))  # [R]
    log_mean = tokens.completion_mean(bounded.detach())
    ratio = (log_mean + bounded - bounded.detach()).exp()
    return TokenLosses(-ratio * tokens.advantages, clipped_low, clipped_high)


def _sequence_ratio(tokens: Tokens, max_log_ratio: float | None = None) -> Tensor:
    """[R] s of each row's completion, whose gradient is s * that of the row's own log-probability."""
    log_s = tokens.completion_mean(log_ratio(tokens.logp, tokens.old_logp).detach())
    log_ratios = log_s + tokens.logp - tokens.logp.detach()
    if max_log_ratio is not None:
        log_ratios = log_ratios.clamp(max=max_log_ratio)
    return log_ratios.exp()
