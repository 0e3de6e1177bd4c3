"""Log-probabilities and entropies of tokens from hidden states, without a tensor of all logits.

Letters: R scored rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longrl.models.teacher_targets import TeacherSpan, TeacherTargets, head_logits, row_chunks, span_divergence

MAX_LOGITS = 1 << 26
"""Logits held at a time: 64M, 256 MiB in float32."""


class RowScores(NamedTuple):
    """What the policy says of R rows, float32 each."""

    logp: Tensor
    """[R] log-probabilities of their tokens."""
    entropy: Tensor
    """[R] in nats; without gradient unless it is asked for."""
    divergence: Tensor | None
    """[R] distances to a teacher, 0 where a row has none; None without teachers."""


def chunked_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
    fp32: bool = False,
    entropy_gradient: bool = False,
    teacher: TeacherTargets | None = None,
) -> RowScores:
    """Scores `targets` under softmax(hidden @ weight.T / temperature), a slice of rows at a time.

    The backward pass computes a slice's logits again instead of keeping them, the policy's and the teacher's.

    Args:
        hidden: [R, D] hidden states that predict the targets.
        weight: [V, D] LM head.
        targets: [R] token ids.
        temperature: the one the completions were sampled with; 0 (greedy) counts as 1.
        max_logits: how many logits one slice may hold.
        fp32: multiply in float32, also where autocast would not.
        entropy_gradient: entropies carry a gradient.
        teacher: distributions to which distances are measured, with gradient.
    """
    options = (temperature or 1.0, fp32, entropy_gradient)
    none = hidden.new_zeros(0, dtype=torch.float32)
    logps = [none]
    entropies = [none]
    divergences = [none]
    spans = () if teacher is None else teacher.spans
    for rows, span in row_chunks(spans, len(targets), weight.shape[0], max_logits):
        local = hidden[rows]
        logp, entropy, divergence = checkpoint(
            _score, local, weight, targets[rows], *options, span, teacher, use_reentrant=False
        )
        logps.append(logp)
        entropies.append(entropy)
        divergences.append(torch.zeros_like(logp) if divergence is None else divergence)
    distances = None if teacher is None else torch.cat(divergences)
    return RowScores(torch.cat(logps), torch.cat(entropies), distances)


def _score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    fp32: bool,
    entropy_gradient: bool,
    span: TeacherSpan | None,
    teacher: TeacherTargets | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    logits = head_logits(hidden, weight, temperature, fp32)  # [R, V]
    normaliser = logits.logsumexp(-1)  # [R]
    chosen = logits.gather(-1, targets[:, None])
    logp = chosen[:, 0] - normaliser
    if entropy_gradient:
        # H = -sum_v p_v log p_v, whose gradient is rounded 20 times less in float32 than that of the one below.
        all_logp = logits - normaliser[:, None]
        entropy = -(all_logp.exp() * all_logp).sum(-1)
    else:
        with torch.no_grad():
            # H = log Z - sum_v p_v logit_v
            probabilities = torch.exp(logits - normaliser[:, None])
            expected = (probabilities * logits).sum(-1)
            entropy = normaliser - expected
    if span is None:
        return logp, entropy, None
    assert teacher is not None
    return logp, entropy, span_divergence(logits, normaliser, span, teacher, fp32)
