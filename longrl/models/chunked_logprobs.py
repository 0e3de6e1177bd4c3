"""Log-probabilities and entropies of tokens from hidden states, without a tensor of all logits.

Letters: R scored rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26
"""Logits held at a time: 64M, 256 MiB in float32."""


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
    fp32: bool = False,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scores `targets` under softmax(hidden @ weight.T / temperature), a slice of rows at a time.

    The backward pass computes a slice's logits again instead of keeping them.

    Args:
        hidden: [R, D] hidden states that predict the targets.
        weight: [V, D] LM head.
        targets: [R] token ids.
        temperature: the one the completions were sampled with; 0 (greedy) counts as 1.
        max_logits: how many logits one slice may hold.
        fp32: multiply in float32, also where autocast would not.
        entropy_gradient: entropies carry a gradient.

    Returns:
        ([R] float32 log-probabilities, [R] float32 entropies in nats, without gradient unless it is asked for).
    """
    vocabulary = weight.shape[0]
    step = max(1, max_logits // vocabulary)
    temperature = temperature or 1.0
    none = hidden.new_zeros(0, dtype=torch.float32)
    logps = [none]
    entropies = [none]
    num_rows = max(len(targets), 1)  # also without rows there is a slice, for a rank's gradients to be zeros
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        local = hidden[rows]
        logp, entropy = checkpoint(
            _score, local, weight, targets[rows], temperature, fp32, entropy_gradient, use_reentrant=False
        )
        logps.append(logp)
        entropies.append(entropy)
    return torch.cat(logps), torch.cat(entropies)


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, fp32: bool, entropy_gradient: bool
) -> tuple[Tensor, Tensor]:
    if fp32:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden.float() @ weight.float().T
    else:
        logits = hidden @ weight.T
    logits = logits.float() / temperature  # [R, V]
    normaliser = logits.logsumexp(-1)  # [R]
    chosen = logits.gather(-1, targets[:, None])
    logp = chosen[:, 0] - normaliser
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        # H = log Z - sum_v p_v logit_v
        probabilities = torch.exp(logits - normaliser[:, None])
        expected = (probabilities * logits).sum(-1)
        entropy = normaliser - expected
    return logp, entropy
