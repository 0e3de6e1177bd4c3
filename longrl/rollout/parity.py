"""Does the engine see what the trainer sees? Greedy tokens of a few prompts, scored by both, before the first step.

Engines go silently wrong: other positions behind a video, other frames, stale weights. Each shows in log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.types import Completion, Prompt

NUM_SHOWN = 8
"""Tokens in the message of a failed check."""


@dataclass(frozen=True)
class Gap:
    """How far apart engine and trainer are on the engine's own tokens."""

    engine_logp: Tensor
    """[N] log-probabilities the engine reported."""
    trainer_logp: Tensor
    """[N] of the same tokens under the trainer's forward pass."""

    @property
    def difference(self) -> Tensor:
        """[N] trainer less engine."""
        return self.trainer_logp - self.engine_logp

    def metrics(self) -> dict[str, float]:
        """Mean and largest absolute difference, k3 estimate of KL(engine || trainer), share of effective samples.

        k3 is that of Schulman's note, exp(d) - 1 - d with d the difference; the effective sample size is that of
        importance weights exp(d) (Kong 1992), over the number of tokens.
        """
        if not len(self.difference):
            return {}
        difference = self.difference.double().clamp(-20, 20)
        weights = difference.exp()
        return {
            "mean": float(difference.abs().mean()),
            "max": float(difference.abs().max()),
            "k3": float((weights - 1 - difference).mean()),
            "effective_share": float(weights.sum() ** 2 / (weights.square().sum() * len(weights))),
        }


def check(gap: Gap, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], max_gap: float) -> None:
    """Raises RuntimeError with a table of the tokens that differ most if any differs by more than `max_gap`."""
    difference = gap.difference.abs()
    if not len(difference) or float(difference.max()) <= max_gap:
        return
    tokens = [
        (prompt.id, place, int(token))
        for prompt, own in zip(prompts, completions, strict=True)
        for completion in own
        for place, token in enumerate(completion.token_ids)
    ]
    worst = torch.topk(difference, min(NUM_SHOWN, len(difference))).indices.tolist()
    lines = [
        f"  prompt {tokens[row][0]!r}, token {tokens[row][1]} (id {tokens[row][2]}): engine "
        f"{float(gap.engine_logp[row]):.4f}, trainer {float(gap.trainer_logp[row]):.4f}"
        for row in worst
    ]
    lengths = ", ".join(f"{item.id!r} {len(item.input_ids)} tokens, {len(item.media)} media" for item in prompts)
    raise RuntimeError(
        f"engine and trainer disagree by up to {float(difference.max()):.4f} in the log-probability of a greedy token, "
        f"more than max_gap={max_gap} of the RolloutCallback; training would follow another model than the one that "
        f"samples. The tokens that differ most:\n" + "\n".join(lines) + f"\nPrompts: {lengths}. Check that engine and "
        "family read the same folder and dtype (a difference of 0.1 is usual in bfloat16), or raise max_gap"
    )


def stacked(completions: Sequence[Sequence[Completion]]) -> Tensor:
    """[N] log-probabilities of all tokens, as the engine reported them."""
    parts = [completion.logprobs for own in completions for completion in own]
    return torch.cat([torch.zeros(0), *parts])

