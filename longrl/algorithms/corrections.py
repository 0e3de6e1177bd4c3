"""Corrections: did the engine that sampled a token agree with the trainer?

Letters: R tokens of a micro-batch.

With q = old policy / sampler at a token, two policies of the same weights but of different kernels and precision, the
surrogate loss of a token is multiplied by a detached factor; the KL term is not. The old policy of tokens that older
weights drew is the sampler itself, and q is 1, unless `Algorithm.decoupled` is set. Factors change no normalisation:
a dropped token still counts in the weights, as in TRL and verl. A token whose sampler log-probability is not finite
is dropped (factor 0), and left out of its completion's product or mean. Where OLD ones are not finite the whole
completion goes (longrl/modules/mini_batches.py).

Truncated: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; masked and sequence level: Liu et al. 2025,
https://yingru.notion.site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longrl.algorithms.losses import MAX_LOG_RATIO, Tokens
from longrl.algorithms.needs import Needs, needs
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges

Correction = Callable[[Tokens, float], Any]  # (tokens, cap) -> Tensor [R]


@needs(rows="any")
def no_correction(tokens: Tokens, cap: float) -> Tensor:
    """Factor 1, [R]: the sampler's log-probabilities are not looked at."""
    return torch.ones_like(tokens.old_logp)


@needs(rows="tokens")
def truncated_token(tokens: Tokens, cap: float) -> Tensor:
    """Factor min(q, cap) for each token, [R]."""
    return _engine_ratio(tokens).clamp(max=cap)


@needs(rows="tokens")
def masked_token(tokens: Tokens, cap: float) -> Tensor:
    """Factor q where q <= cap, else 0, for each token, [R].

    One-sided, as in TRL and ms-swift; `TwoSidedMask` also drops tokens of a small q.
    """
    q = _engine_ratio(tokens)
    return q.where(q <= cap, 0.0)


@needs(rows="tokens", over_completion=True)
def truncated_sequence(tokens: Tokens, cap: float) -> Tensor:
    """Factor min(Q, cap), Q = product of q over the completion, for all its tokens, [R].

    The product is the unbiased weight (TRL, verl); ms-swift means the geometric mean by "sequence".
    """
    return _engine_ratio(tokens, over_completion=True).clamp(max=cap)


@needs(rows="tokens", over_completion=True)
def masked_sequence(tokens: Tokens, cap: float) -> Tensor:
    """Factor Q where Q <= cap, else 0, Q = product of q over the completion, for all its tokens, [R]."""
    q = _engine_ratio(tokens, over_completion=True)
    return q.where(q <= cap, 0.0)


@dataclass(frozen=True)
class TwoSidedMask:
    """Factor q where low <= q <= high, else 0: IcePop, arXiv:2510.18855 (Ring-1T), whose range is 0.5 to 5.

    Over completions q is the product Q, as in `masked_sequence`; TRL has both by a lower bound of its masks. The bounds
    are its own: `correction_cap` is not read.
    """

    low: float = 0.5
    high: float = 5.0
    over_completion: bool = False
    """Q of a completion in the place of q of each token."""

    def __post_init__(self) -> None:
        _check_bounds(self)

    @property
    def needs(self) -> Needs:
        """Tokens that an engine sampled."""
        return Needs(rows="tokens", over_completion=self.over_completion)

    def __call__(self, tokens: Tokens, cap: float) -> Tensor:
        """The factors [R]."""
        q = _engine_ratio(tokens, over_completion=self.over_completion)
        return q.where((q >= self.low) & (q <= self.high), 0.0)


@dataclass(frozen=True)
class GeometricMask:
    """Factor 1 where low <= exp(mean over the completion of log q) <= high, else 0, for all its tokens.

    The geometric mean says how far engine and trainer are apart per token, whatever the length, so that the range can
    be narrow (Liu et al. 2025; `seq_mean_k1` of verl, whose bounds are those of 1 / mean). A mask weighs nothing: with
    token weights beside it, `CorrectionProduct`. The bounds are its own: `correction_cap` is not read.
    """

    low: float = 0.99
    high: float = 1.01

    def __post_init__(self) -> None:
        _check_bounds(self)

    @property
    def needs(self) -> Needs:
        """Tokens that an engine sampled."""
        return Needs(rows="tokens", over_completion=True, geometric=True, mask=True)

    def __call__(self, tokens: Tokens, cap: float) -> Tensor:
        """The factors [R]."""
        sampler_logp, known = _sampled(tokens)
        mean = _mean_of_known(tokens, tokens.old_logp - sampler_logp, known).exp()
        return (known & (mean >= self.low) & (mean <= self.high)).to(mean.dtype)


@dataclass(frozen=True)
class OffPolicySequenceMask:
    """Factor 0 where A < 0 and mean over the completion of log(sampler / policy) > max_kl, else 1.

    DeepSeek-V3.2, arXiv:2512.02556, eq. 9 ("off-policy sequence masking"; OPSM of slime): of what has drifted away, the
    policy learns from good completions alone. Compared is the policy that is being updated, which moves from update to
    update, with the one that drew the tokens, whatever their age: mismatch and staleness together. As in TRL and
    ms-swift.
    """

    max_kl: float
    """delta of the paper, which names no value, in nats per token: 0.5 is TRL's example."""

    def __post_init__(self) -> None:
        check_ranges(self, "OffPolicySequenceMask.", max_kl=NOT_NEGATIVE)

    @property
    def needs(self) -> Needs:
        """Tokens that an engine sampled."""
        return Needs(rows="tokens", mask=True)

    def __call__(self, tokens: Tokens, cap: float) -> Tensor:
        """The factors [R]."""
        sampler_logp, known = _sampled(tokens)
        mean_kl = _mean_of_known(tokens, sampler_logp - tokens.logp.detach(), known)
        kept = (tokens.advantages >= 0) | (mean_kl <= self.max_kl)
        return (known & kept).to(mean_kl.dtype)


@dataclass(frozen=True)
class CorrectionProduct:
    """Several corrections, whose factors are multiplied.

    Example:
        `CorrectionProduct([GeometricMask(), truncated_token])` weighs the tokens of those completions that the mask
        lets pass: verl's "rejection sampling" beside "importance sampling".
    """

    factors: list[FunctionOrPath[Correction]]

    def __post_init__(self) -> None:
        option = "model.algorithm.correction.init_args.factors"
        if not self.factors:
            raise ValueError(
                f"{option} must name at least one correction, got none; to have none set "
                "model.algorithm.correction to longrl.algorithms.no_correction"
            )
        factors = [resolve_function(factor, option, ("tokens", "cap")) for factor in self.factors]
        object.__setattr__(self, "factors", factors)

    def __call__(self, tokens: Tokens, cap: float) -> Tensor:
        """The factors [R]."""
        product = torch.ones_like(tokens.old_logp)
        for factor in self.factors:
            product = product * factor(tokens, cap)
        return product


def _check_bounds(mask: TwoSidedMask | GeometricMask) -> None:
    if not 0 <= mask.low < mask.high:
        raise ValueError(
            f"{type(mask).__name__} lets ratios from low to high pass and needs 0 <= low < high, got {mask.low} and "
            f"{mask.high}; a range around 1 is meant"
        )


def _engine_ratio(tokens: Tokens, *, over_completion: bool = False) -> Tensor:
    """[R] q of each token, or their product over its completion; 0 where the sampler's is not finite."""
    sampler_logp, known = _sampled(tokens)
    log_q = (tokens.old_logp - sampler_logp).detach().where(known, 0.0)
    if over_completion:
        log_q = tokens.completion_sum(log_q)
    return known * log_q.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _sampled(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[R] sampler's log-probabilities, and where they are finite; elsewhere they are 0."""
    if tokens.sampler_logp is None:
        raise ValueError(
            "this correction needs the log-probabilities of the engine that sampled, got none; "
            "set model.algorithm.correction to longrl.algorithms.no_correction"
        )
    known = tokens.sampler_logp.isfinite()
    return tokens.sampler_logp.where(known, 0.0), known


def _mean_of_known(tokens: Tokens, values: Tensor, known: Tensor) -> Tensor:
    """[R] mean over the known rows of each row's completion, within +-20 each; 0 where there are none."""
    held = values.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).where(known, 0.0)
    count = tokens.completion_sum(known.to(held.dtype))
    return tokens.completion_sum(held) / count.clamp(min=1)
