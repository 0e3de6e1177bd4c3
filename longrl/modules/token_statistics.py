"""Numbers about the tokens of a rollout that an objective may read beside log-probabilities, before its updates.

Letters: N tokens of a rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longrl.algorithms import Algorithm, function_needs
from longrl.modules.scoring import TokenScores


@dataclass(frozen=True)
class TokenStatistics:
    """Under the policy before the updates; None is what the objective does not read."""

    logp: Tensor | None = None
    """[N]"""
    entropy: Tensor | None = None
    """[N] in nats."""
    gradient_norms: Tensor | None = None
    """[N] squared norm of the gradient of each log-probability with respect to its logits."""


NO_STATISTICS = TokenStatistics()
"""Of an objective that reads none."""


def statistics_passes(algorithm: Algorithm) -> int:
    """Scoring passes per rollout for what `algorithm` reads."""
    if any(need.gradient_norms for _, _, need in function_needs(algorithm)):
        return 2
    return int(algorithm.top_entropy_share < 1)


def token_statistics(
    algorithm: Algorithm, score: Callable[[float], TokenScores], temperature: float
) -> TokenStatistics:
    """What `algorithm` reads: entropies of one scoring pass, gradient norms of a second one.

    Args:
        algorithm: the objective.
        score: scores all tokens under the policy at a temperature; on every rank of the run.
        temperature: of the rollouts; 0 counts as 1.
    """
    passes = statistics_passes(algorithm)
    if not passes:
        return NO_STATISTICS
    scores = score(temperature)
    norms = None
    if passes == 2:
        halved = score((temperature or 1.0) / 2)
        norms = gradient_norms(scores.logp, halved.logp)
    return TokenStatistics(scores.logp, scores.entropy, norms)


def gradient_norms(logp: Tensor, logp_at_half: Tensor) -> Tensor:
    """1 - 2 pi + sum over the vocabulary of pi^2: the squared norm of d log pi(token) / d logits. [N] float64.

    With logits l, logp is l - log sum exp(l) and at half the temperature 2 l - log sum exp(2 l), both of the token that
    was drawn; so the sum of squares, sum exp(2 l) / (sum exp(l))^2, is exp(2 logp - logp_at_half) whatever the token.

    Args:
        logp: [N] at the rollouts' temperature.
        logp_at_half: [N] at half of it.
    """
    pi = logp.double().exp()
    squares = (2 * logp.double() - logp_at_half.double()).exp()
    return (1 - 2 * pi + squares).clamp(min=0.0)
