"""From hidden states to tokens: logits, and draws by given random numbers.

Letters: B rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from longrl.models.base import CausalFamily
from longrl.types import SamplingParams


class LMHead:
    """The LM head of a model that decodes, in float32 where `family.fp32_lm_head` asks for it.

    Args:
        family: of the model.
        model: made by `build`.
    """

    def __init__(self, family: CausalFamily, model: Any) -> None:
        self.weight: Tensor = model.get_output_embeddings().weight
        """[V, D]."""
        self._precision: Any = contextlib.nullcontext()
        if family.fp32_lm_head:  # also where layers compute in another precision by autocast
            self.weight = self.weight.float()
            self._precision = torch.autocast(self.weight.device.type, enabled=False)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, D] -> logits [B, V]."""
        with self._precision:
            return hidden.to(self.weight.dtype) @ self.weight.T


def sample_tokens(logits: Tensor, sampling: SamplingParams, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws a token for each row, or takes the likeliest at temperature 0.

    Args:
        logits: [B, V].
        sampling: temperature, top-k and top-p.
        uniform: [B] numbers in [0, 1) that decide the draw, on the device of the logits.

    Returns:
        ([B] tokens, [B] their log-probabilities under the distribution they were drawn from).
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logp = logits.log_softmax(-1)
        token = logp.argmax(-1)
        return token, logp.gather(-1, token[:, None])[:, 0]
    logits = logits / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        from transformers import TopKLogitsWarper, TopPLogitsWarper

        if sampling.top_k:
            logits = TopKLogitsWarper(sampling.top_k)(None, logits)
        if sampling.top_p < 1:
            logits = TopPLogitsWarper(sampling.top_p)(None, logits)
    logp = logits.log_softmax(-1)
    # The first token whose cumulated mass exceeds the number; rounding: all of the mass is not 1 exactly.
    cumulated = logp.double().exp().cumsum(-1)  # [B, V]
    threshold = uniform[:, None] * cumulated[:, -1:]  # [B, 1]
    token = torch.searchsorted(cumulated, threshold.contiguous(), right=True)[:, 0].clamp_max(logp.shape[-1] - 1)
    return token, logp.gather(-1, token[:, None])[:, 0]
