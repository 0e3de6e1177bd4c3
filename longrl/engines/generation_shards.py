"""Which rank of a sequence-parallel group generates which completions, and how groups are put together again.

Every prompt is prefilled by one rank, as long as there are enough prompts for all.

Letters: P prompts, G completions of each.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from longrl.engines.rollout_engine import RolloutEngine
from longrl.models.base import CausalFamily
from longrl.strategies.axis import Axis
from longrl.types import Group, Prompt, SamplingParams


@dataclass(frozen=True)
class GenerationShard:
    """Neighbouring completions of one prompt that one rank generates."""

    prompt: int
    """Index of the prompt."""
    first: int
    """Index of the first of them among the prompt's G."""
    count: int


GeneratedShards = list[tuple[GenerationShard, Group]]
"""A rank's shards with their completions."""


def generation_shards(num_prompts: int, num_generations: int, rank: int, size: int) -> list[GenerationShard]:
    """A rank's shards of P * G completions: whole prompts if there are enough for all ranks, else parts of prompts.

    Args:
        num_prompts: P.
        num_generations: G.
        rank: in its sequence-parallel group.
        size: of the group.

    Example:
        `generation_shards(2, 8, rank=1, size=4)` is `[GenerationShard(prompt=0, first=4, count=4)]`.
    """
    if num_prompts >= size:
        prompts = range(num_prompts * rank // size, num_prompts * (rank + 1) // size)
        return [GenerationShard(prompt, 0, num_generations) for prompt in prompts]
    total = num_prompts * num_generations
    start = total * rank // size
    stop = total * (rank + 1) // size
    shards = []
    while start < stop:
        prompt, first = divmod(start, num_generations)
        count = min(num_generations - first, stop - start)
        shards.append(GenerationShard(prompt, first, count))
        start += count
    return shards


@dataclass(frozen=True)
class RolloutRequest:
    """Prompts and how to sample them."""

    prompts: Sequence[Prompt]
    """Those of the sequence-parallel group."""
    engine_prompts: Sequence[Prompt]
    """The same under the ids that decide their samples."""
    samplings: Sequence[SamplingParams]
    """Every one gives a list of groups."""
    seed: int


def generate_shards(
    engine: RolloutEngine,
    family: CausalFamily,
    model: nn.Module,
    request: RolloutRequest,
    features: Mapping[str, Tensor],
    sp_group: Axis,
) -> list[GeneratedShards]:
    """This rank's shards, for each way of sampling: one call of the engine for whole prompts, one per part of a prompt.

    Args:
        engine: generates.
        family: of the model, in the precision that the engine computes in.
        model: the trainer's.
        request: the same on all ranks of the group.
        features: {media key: [N, D]} of the prompts.
        sp_group: the ranks that share the request; those that make up one engine ask for the same.
    """
    engine_rank = sp_group.rank // engine.ranks_per_engine
    num_engines = sp_group.size // engine.ranks_per_engine
    by_sampling: list[GeneratedShards] = []
    for sampling in request.samplings:
        generated: GeneratedShards = []
        local = generation_shards(len(request.prompts), sampling.num_generations, engine_rank, num_engines)
        for (first, count), alike in itertools.groupby(local, key=operator.attrgetter("first", "count")):
            shards = list(alike)
            prompts = [request.engine_prompts[shard.prompt] for shard in shards]
            params = sampling
            if count < sampling.num_generations:
                params = replace(sampling, num_generations=count)
            answers = engine.generate(family, model, prompts, features, params, request.seed, first)
            for shard, completions in zip(shards, answers, strict=True):
                generated.append((shard, Group(request.prompts[shard.prompt], completions)))
        by_sampling.append(generated)
    return by_sampling


def gather_groups(
    prompts: Sequence[Prompt], local: Sequence[tuple[GenerationShard, Group]], sp_group: Axis, num_chunks: int
) -> list[Group]:
    """Full groups of all prompts, from every rank's scored shards; prompts and their media do not travel.

    Args:
        prompts: of the sequence-parallel group, the same on all its ranks.
        local: this rank's shards.
        sp_group: the ranks that have the others.
        num_chunks: messages; more of them need less memory.
    """
    if sp_group.size == 1:
        return [group for _, group in local]
    # 1. All ranks get all shards. Prompts stay at home: every rank has them, and their media are large.
    sent = [(shard, group.completions, group.rewards, group.reward_parts, group.valid) for shard, group in local]
    received = sp_group.gather_list(sent, num_chunks)
    received.sort(key=lambda item: (item[0].prompt, item[0].first))
    # 2. Shards of a prompt lie side by side now: a full group is all of them end to end.
    groups = []
    for index, prompt in enumerate(prompts):
        shards = [fields for shard, *fields in received if shard.prompt == index]
        completions, rewards, reward_parts, valid = zip(*shards, strict=True)
        groups.append(
            Group(
                prompt,
                [completion for part in completions for completion in part],
                torch.cat(rewards),
                {name: torch.cat([part[name] for part in reward_parts]) for name in reward_parts[0]},
                torch.cat(valid),
            )
        )
    return groups
