"""Did the engine that sampled agree with the trainer? Importance weights where it did not.

With q = old policy / sampler at a token, two policies of the same weights but of different kernels and precision (or,
for asynchronous rollouts, of older weights), the surrogate loss of a token is multiplied by a detached factor; the KL
term is not. Factors change no normalisation: a dropped token still counts in the weights. A token whose sampler
log-probability is not finite is dropped (factor 0), and left out of its completion's product.

Truncated: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; masked and sequence level: Liu et al. 2025, "When
speed kills stability", https://yingru.notion.site. Neither is on arXiv.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrl.algorithms.kl import MAX_LOG_RATIO
from longrl.algorithms.tokens import Tokens


def no_correction(tokens: Tokens, cap: float) -> Tensor:
    """Factor 1, [R]: the sampler's log-probabilities are not looked at."""
    return torch.ones_like(tokens.old_logp)


def truncated_token(tokens: Tokens, cap: float) -> Tensor:
    """Factor min(q, cap) for each token, [R]."""
    log_q, known = _log_q(tokens)
    return known * _exp(log_q).clamp(max=cap)


def masked_token(tokens: Tokens, cap: float) -> Tensor:
    """Factor q where q <= cap, else 0, for each token, [R].

    One-sided, as in TRL and ms-swift; IcePop (arXiv:2510.18855) also drops tokens of a small q.
    """
    log_q, known = _log_q(tokens)
    return known * _zero_above(_exp(log_q), cap)


def truncated_sequence(tokens: Tokens, cap: float) -> Tensor:
    """Factor min(Q, cap), Q = product of q over the completion, for all its tokens, [R].

    The product is the unbiased weight (TRL, verl); ms-swift means the geometric mean by "sequence".
    """
    log_q, known = _log_q(tokens)
    return known * _exp(tokens.completion_sum(log_q)).clamp(max=cap)


def masked_sequence(tokens: Tokens, cap: float) -> Tensor:
    """Factor Q where Q <= cap, else 0, Q = product of q over the completion, for all its tokens, [R]."""
    log_q, known = _log_q(tokens)
    return known * _zero_above(_exp(tokens.completion_sum(log_q)), cap)


def _log_q(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """[R] log q, 0 where the sampler's is not finite, and [R] bool where it is."""
    if tokens.sampler_logp is None:
        raise ValueError(
            "this correction needs the log-probabilities of the engine that sampled, got none; "
            "set model.algorithm.correction to longrl.algorithms.no_correction"
        )
    known = tokens.sampler_logp.isfinite()
    return (tokens.old_logp - tokens.sampler_logp).detach().where(known, 0.0), known


def _exp(log_q: Tensor) -> Tensor:
    return log_q.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _zero_above(q: Tensor, cap: float) -> Tensor:
    return q.where(q <= cap, 0.0)
