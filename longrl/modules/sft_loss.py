"""The loss of SFT and what it teaches: one response of each prompt."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longrl.algorithms import LossOutput
from longrl.modules.mini_batches import TokenLoss
from longrl.types import Batch, Continuation, Packed, PolicyOutput


@dataclass(frozen=True)
class SFTLoss(TokenLoss):
    """Negative log-likelihood per response token of the whole batch: a `TokenLoss`."""

    num_tokens: int
    """Response tokens of all ranks."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        loss = -output.logp.sum() / self.num_tokens
        entropy = output.entropy.sum() / self.num_tokens
        return LossOutput(loss, {"entropy": entropy})

    def tensors(self) -> dict[str, Tensor]:
        """See `TokenLoss`."""
        return {}


def response_targets(batch: Batch) -> list[list[Continuation]]:
    """The SFT target of each prompt.

    Raises:
        ValueError: the prompts have none, for they are meant to be answered by a rollout callback.
    """
    targets = []
    for prompt in batch.prompts:
        if prompt.response is None:
            raise ValueError(
                "data.stage=rl gives prompts without targets, and no RolloutCallback is there to answer them; set "
                "rollout.reward (configs/reward/), or data.stage to sft"
            )
        targets.append([prompt.response])
    return targets
