"""What is kept of a teacher's distributions between its pass and the update: never one number for each token there is.

Letters: R scored rows, D hidden size, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.models.chunked_logprobs import MAX_LOGITS
from longrl.models.teacher_targets import head_logits
from longrl.types import RowDistributions


@dataclass(frozen=True)
class KeptDistributions:
    """What a forward pass returns of every row's distribution: the likeliest tokens, or the hidden state."""

    top_k: int | None
    """None keeps hidden states, from which the head gives the whole distribution again."""
    vocabulary: int
    """Rows of the policy's head: what lies behind them in this one is padding."""

    @torch.no_grad()
    def of_rows(
        self, hidden: Tensor, weight: Tensor, temperature: float, fp32: bool, max_logits: int = MAX_LOGITS
    ) -> RowDistributions:
        """The rows' distributions, without gradient.

        Args:
            hidden: [R, D] that predict the rows' tokens.
            weight: [V, D] LM head.
            temperature: 0 counts as 1.
            fp32: multiply in float32, also where autocast would not.
            max_logits: held at a time.
        """
        if self.top_k is None:
            # As the head is going to read them: autocast rounds to that in any case.
            if torch.is_autocast_enabled(hidden.device.type) and not fp32:
                hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
            return RowDistributions(hidden=hidden.detach())
        step = max(1, max_logits // len(weight))
        top_k = min(self.top_k, self.vocabulary, len(weight))
        ids = [torch.zeros(0, top_k, dtype=torch.int64, device=hidden.device)]
        logps = [torch.zeros(0, top_k, device=hidden.device)]
        for start in range(0, len(hidden), step):
            logits = head_logits(hidden[start : start + step], weight, temperature or 1.0, fp32)
            top = logits[:, : self.vocabulary].topk(top_k, -1)
            ids.append(top.indices)
            logps.append(top.values - logits.logsumexp(-1, keepdim=True))
        return RowDistributions(top_ids=torch.cat(ids), top_logp=torch.cat(logps))
