"""Scores and gradients of packed groups: what is compared with one plain forward for each completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longrl.features.cache import FeatureCache
from longrl.features.trainable_features import TrainableFeatures
from longrl.models.base import CausalFamily
from longrl.modules.policy import all_media
from longrl.packing.pack import Continuations, continuations, pack
from longrl.strategies.parallel import SINGLE_RANK_GRID, Parallel
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.testing.plain_forward import gradients
from longrl.types import Prompt

NO_LIMIT = 1 << 30


def loss_weights(num_tokens: int) -> Tensor:
    """[N] of either sign."""
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(1))


def packed_scores(
    family: CausalFamily,
    model: Any,
    prompts: Sequence[Prompt],
    completions: Continuations,
    parallel: Parallel = SINGLE_RANK_GRID,
    sequence: SequenceParallel = NO_SEQUENCE_PARALLEL,
    max_tokens: int = NO_LIMIT,
    share_prefix: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """[N] log-probabilities of packed groups, and the gradients of their sum weighted by `loss_weights`.

    Args:
        family: of the model.
        model: gets no gradients to keep.
        prompts: P of them.
        completions: of each prompt; N of their tokens were sampled.
        parallel: the ranks that share media.
        sequence: the ranks that share sequences.
        max_tokens: of a micro-batch.
        share_prefix: False repeats a prompt for each of its completions.
    """
    groups = continuations(completions)
    if not share_prefix:
        prompts = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
        groups = [[completion] for group in groups for completion in group]
    media = all_media(prompts, groups)
    trained = None
    if family.trained_encoders(model):
        trained = TrainableFeatures(family, model, media, parallel)
        features = trained.leaves
    else:
        features = FeatureCache(family, parallel=parallel).get_or_encode(model, media)
    weights = loss_weights(sum(completion.num_sampled for group in groups for completion in group))
    logps = torch.zeros(len(weights))
    for packed in pack(prompts, groups, max_tokens):
        output = family.forward(model, packed, features, 1.0, sequence)
        logps[packed.token_index] = output.logp.detach()
        (output.logp * weights[packed.token_index]).sum().backward()
    if trained is not None:
        trained.backward()
    grads = gradients(model)
    model.zero_grad()
    return logps, grads
