"""Corrections: did the engine that sampled a token agree with the trainer?

Letters: R tokens of a micro-batch.

With q = old policy / sampler at a token, two policies of the same weights but of different kernels and precision, the
surrogate loss of a token is multiplied by a detached factor; the KL term is not. The old policy of tokens that older
weights drew is the sampler itself, and q is 1, unless `Algorithm.decoupled` is set. Factors change no normalisation:
a dropped token still counts in the weights, as in TRL and verl. A token whose sampler log-probability is not finite
is dropped (factor 0), and left out of its completion's product. Where OLD ones are not finite the whole completion
goes (longrl/modules/mini_batches.py).

Truncated: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; masked and sequence level: Liu et al. 2025,
https://yingru.notion.site.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longrl.algorithms.losses import MAX_LOG_RATIO, Tokens
from longrl.algorithms.needs import needs


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

    One-sided, as in TRL and ms-swift; IcePop (arXiv:2510.18855) also drops tokens of a small q.
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


def _engine_ratio(tokens: Tokens, *, over_completion: bool = False) -> Tensor:
    """[R] q of each token, or their product over its completion; 0 where the sampler's is not finite."""
    if tokens.sampler_logp is None:
        raise ValueError(
            "this correction needs the log-probabilities of the engine that sampled, got none; "
            "set model.algorithm.correction to longrl.algorithms.no_correction"
        )
    known = tokens.sampler_logp.isfinite()
    log_q = (tokens.old_logp - tokens.sampler_logp).detach().where(known, 0.0)
    if over_completion:
        log_q = tokens.completion_sum(log_q)
    return known * log_q.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
