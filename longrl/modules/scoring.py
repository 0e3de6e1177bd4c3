"""Forward passes over prompts and what follows them: packed into micro-batches, of which every rank takes its part.

Letters: N sampled tokens of this rank's completions, completion after completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from longrl.features.cache import HasMedia
from longrl.io.pulse import PULSE
from longrl.packing.experts import with_experts
from longrl.packing.pack import Continuations, continuations, dummy_micro_batch, pack
from longrl.strategies.fsdp import RootModule
from longrl.strategies.parallel import Parallel
from longrl.strategies.sequence import SequenceParallel
from longrl.types import Features, Packed, PolicyOutput, Prompt


class TokenScores(NamedTuple):
    """Of the sampled tokens of a rank's completions, [N] each."""

    logp: Tensor
    entropy: Tensor
    """In nats, of the distribution the token was drawn from."""


@dataclass(frozen=True)
class PackedScoring:
    """Micro-batches of a policy, and its scores without gradient.

    Args:
        parallel: the ranks.
        max_tokens_per_micro_batch: tokens of one forward pass on one rank, N times as many on N that share a sequence.
        num_axes: of positions.
        device: of all tensors.
    """

    parallel: Parallel
    max_tokens_per_micro_batch: int
    num_axes: int
    device: torch.device

    def micro_batches(
        self, prompts: Sequence[Prompt], completions: Continuations, replays_experts: bool = True
    ) -> tuple[list[Packed | None], SequenceParallel]:
        """This rank's micro-batches, and the ranks that share each.

        Experts that completions carry are used in place of the routers' choice, if asked for. None stands for one to
        wait through, so that all ranks of the run have the same number: gathering sharded weights needs all of them.
        """
        # 1. As few ranks share a sequence as the longest group allows: sharing costs time.
        longest = 1
        groups = continuations(completions)
        for prompt, group in zip(prompts, groups, strict=True):
            num_tokens = len(prompt.input_ids) + sum(len(completion.token_ids) for completion in group)
            longest = max(longest, num_tokens)
        budget = self.max_tokens_per_micro_batch
        degrees = self.parallel.degrees
        fitting = [degree for degree in degrees if degree * budget >= longest]
        sequence = degrees[min(fitting) if fitting else max(degrees)]
        # 2. Parts of the sequence-parallel group that share a sequence take turns.
        packed = pack(prompts, groups, budget * sequence.size)
        if replays_experts:
            packed = with_experts(packed, groups)
        sp_group = self.parallel.sp_group
        num_parts = sp_group.size // sequence.size
        part = sp_group.rank // sequence.size
        local: list[Packed | None] = [*packed[part::num_parts]]
        # 3. As many on every rank.
        count = self.parallel.dp.max(-(-len(packed) // num_parts))
        return local + [None] * (count - len(local)), sequence

    def on_device(self, packed: Packed | None) -> Packed:
        """The micro-batch where it is computed; the smallest there is in place of one to wait through."""
        return (packed or dummy_micro_batch(self.num_axes)).to(self.device)

    def logp(
        self,
        policy: RootModule,
        prompts: Sequence[Prompt],
        completions: Continuations,
        features: Features,
        temperature: float,
        replays_experts: bool = True,
    ) -> Tensor:
        """[N] log-probabilities of all sampled tokens, of `scores`."""
        return self.scores(policy, prompts, completions, features, temperature, replays_experts).logp

    @torch.no_grad()
    def scores(
        self,
        policy: RootModule,
        prompts: Sequence[Prompt],
        completions: Continuations,
        features: Features,
        temperature: float,
        replays_experts: bool = True,
    ) -> TokenScores:
        """Log-probabilities and entropies at all sampled tokens. Every rank of the run must call it.

        Args:
            policy: the one being trained, its reference, or another.
            prompts: this rank's.
            completions: what follows each.
            features: of all media, as `policy` encodes them.
            temperature: they were sampled with.
            replays_experts: take the experts that completions carry; the reference chooses itself.
        """
        groups = continuations(completions)
        micro_batches, sequence = self.micro_batches(prompts, groups, replays_experts)
        num_tokens = sum(completion.num_sampled for group in groups for completion in group)
        scores = torch.zeros(2, num_tokens, device=self.device)
        for packed in micro_batches:
            PULSE.beats += 1
            here = self.on_device(packed)
            output: PolicyOutput = policy(here, features, temperature, sequence)
            if packed is not None:
                scores[:, here.token_index] = torch.stack([output.logp, output.entropy])
        sp_group = self.parallel.sp_group
        if sequence.size < sp_group.size:  # other ranks of the group had the other micro-batches
            scores = sp_group.sum(scores) / sequence.size
        return TokenScores(*scores)


def all_media(prompts: Sequence[Prompt], completions: Continuations) -> list[HasMedia]:
    """Prompts and what follows them: all that has media."""
    return [*prompts, *(completion for group in continuations(completions) for completion in group)]
