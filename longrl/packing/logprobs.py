"""Log-probabilities and entropies of the scored rows only, without ever holding [rows, vocabulary] at once.

Letters: R scored rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26
"""Logits held at a time: 64M, 256 MiB in float32."""


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, max_logits: int = MAX_LOGITS
) -> tuple[Tensor, Tensor]:
    """Scores `targets` under softmax(hidden @ weight.T / temperature), a slice of rows at a time.

    The backward pass computes a slice's logits again instead of keeping them.

    Args:
        hidden: [R, D] hidden states that predict the targets.
        weight: [V, D] LM head.
        targets: [R] token ids.
        temperature: the one the completions were sampled with; 0 (greedy) counts as 1.
        max_logits: how many logits one slice may hold.

    Returns:
        ([R] float32 log-probabilities, [R] float32 entropies in nats, without gradient).
    """
    step = max(1, max_logits // weight.shape[0])
    logps, entropies = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
    for start in range(0, max(len(targets), 1), step):  # also without rows, for a rank's gradients to be zeros
        rows = slice(start, start + step)
        logp, entropy = checkpoint(_score, hidden[rows], weight, targets[rows], temperature or 1.0, use_reentrant=False)
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def _score(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).float() / temperature
    normaliser = logits.logsumexp(-1)
    logp = logits.gather(-1, targets[:, None])[:, 0] - normaliser
    with torch.no_grad():
        # H = log Z - sum_v p_v logit_v
        entropy = normaliser - (torch.exp(logits - normaliser[:, None]) * logits).sum(-1)
    return logp, entropy
