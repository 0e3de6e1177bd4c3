"""What an engine is asked for at once, and this rank's part of the answer, now or in the background."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor, nn

from longrl.engines.generation_shards import GenerationShard, generation_shards
from longrl.engines.rollout_engine import RolloutEngine
from longrl.models.base import CausalFamily
from longrl.modules.policy import PolicyModule
from longrl.strategies.axis import Axis
from longrl.types import Group, Prompt, SamplingParams

Generated = list[list[tuple[GenerationShard, Group]]]
"""For each way of sampling this rank's part of the groups, without rewards."""


@dataclass(frozen=True)
class RolloutRequest:
    """Prompts and how to sample them."""

    prompts: Sequence[Prompt]
    """Of the sequence-parallel group."""
    engine_prompts: Sequence[Prompt]
    """The same under the ids that decide their samples."""
    samplings: Sequence[SamplingParams]
    """Every one gives a list of groups."""
    seed: int


def generate_part(
    engine: RolloutEngine,
    family: CausalFamily,
    model: nn.Module,
    request: RolloutRequest,
    features: Mapping[str, Tensor],
    sp_group: Axis,
) -> Generated:
    """This rank's part of the groups: one call of the engine for whole prompts, one for each part of a prompt.

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
    generated: Generated = []
    for sampling in request.samplings:
        part = []
        local = generation_shards(len(request.prompts), sampling.num_generations, engine_rank, num_engines)
        for (first, count), alike in itertools.groupby(local, key=operator.attrgetter("first", "count")):
            shards = list(alike)
            prompts = [request.engine_prompts[shard.prompt] for shard in shards]
            params = dataclasses.replace(sampling, num_generations=count)
            answers = engine.generate(family, model, prompts, features, params, request.seed, first)
            for shard, completions in zip(shards, answers, strict=True):
                part.append((shard, Group(request.prompts[shard.prompt], completions)))
        generated.append(part)
    return generated


class BackgroundRollout:
    """A rollout that an engine in another process generates while the trainer updates.

    Args:
        engine: generates.
        module: the trainer, whose weights the engine has been handed.
        request: see `generate_part`.
        features: see `generate_part`.
    """

    def __init__(
        self, engine: RolloutEngine, module: PolicyModule, request: RolloutRequest, features: Mapping[str, Tensor]
    ) -> None:
        self.engine = engine
        self.module = module
        self.request = request
        self.features = features
        self.generated: Future[Generated] = Future()
        # A daemon does not keep a process alive which ends for another reason.
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        module = self.module
        sp_group = module.parallel.sp_group
        try:
            generated = generate_part(
                self.engine, module.engine_family, module.model, self.request, self.features, sp_group
            )
            self.generated.set_result(generated)
        except BaseException as error:
            self.generated.set_exception(error)
