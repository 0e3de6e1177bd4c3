"""Rollout engines: their interface, the seeds of their samples, and which rank generates which completions.

Whatever the engine, equal seeds give equal completions: what seeds a prompt's samples is the seed of the rollout and an
id of the prompt, never its batch, its rank or its device. Every prompt is prefilled by one rank, as long as there are
enough prompts for all ranks of a sequence-parallel group.

Letters: P prompts, G completions of each.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from longrl.engines.parity import RenderedPrompt
from longrl.engines.turn_requests import ContinuousRequests
from longrl.environments.runner import EnvironmentRunner
from longrl.environments.trajectory import Answer, Trajectory
from longrl.io.old_hooks import OLD_HOOKS, RefusesOldHooks
from longrl.models.base import CausalFamily
from longrl.packing.lengths import LengthLimit
from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Prompt, SamplingParams


class RolloutEngine(RefusesOldHooks, abc.ABC):
    """Generates completions with the trainer's weights.

    A step calls `sync`, `generate` for the prompts and for each round of resampling, then `sleep`.
    """

    _old_hooks = OLD_HOOKS["engine"]
    reads_policy_weights: bool = False
    """True if `generate` reads the trainer's model: sharded weights are then gathered around it."""
    is_remote: bool = False
    """True if it computes in another process, so that it can generate while the trainer updates."""
    supports_fp32_lm_head: bool = False
    """True if it computes logits in float32 where `family.fp32_lm_head` asks for it."""
    replays_turns: bool = False
    """True if completions of several turns carry the experts that it chose, as others do (`family.router_replay`)."""
    ranks_per_engine: int = 1
    """How many neighbouring ranks of a sequence-parallel group are one engine: they are given the same prompts and
    return the same completions."""
    num_synced_bytes: int = 0
    """Of weights that went through `counted` so far."""

    @abc.abstractmethod
    def sync(self, family: CausalFamily, model: nn.Module, step: int) -> None:
        """Takes over the trainer's weights of `step`; nothing to do if the engine already holds them.

        Every rank of the run calls it at the same time.
        """

    @abc.abstractmethod
    def generate(
        self,
        family: CausalFamily,
        model: nn.Module,
        prompts: Sequence[Prompt],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        first: int = 0,
    ) -> list[list[Completion]]:
        """G completions of each prompt, from number `first` on: other ranks may have sampled those before.

        Equal seeds give equal completions of a prompt, whatever its batch and whoever samples which.
        """

    def identity(self) -> dict[str, Any]:
        """Options that decide an answer beside weights, prompt, sampling and seed, as plain values that JSON can hold.

        Stored answers are reused while they stay equal. Options that only say where, how fast, or how much at once the
        engine computes stay out. Training does not ask for it.

        Raises:
            ValueError: the engine does not say; an evaluation could not tell its answers from others.
        """
        raise ValueError(
            f"an evaluation must know which options of {type(self).__name__} decide its answers; define its "
            "`identity`, which returns them as a dict, {} if none do"
        )

    def library_versions(self) -> dict[str, str]:
        """Releases of the libraries that compute its answers, by name."""
        import transformers

        return {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}

    def rendered_prompts(
        self, family: CausalFamily, prompts: Sequence[Prompt], features: Mapping[str, Tensor]
    ) -> list[RenderedPrompt]:
        """Each prompt as the engine reads it, to be compared with the trainer's; none if it reads the trainer's."""
        return []

    def max_length(self) -> int | None:
        """Tokens of the longest prompt and completion together, as far as is known before the engine starts."""
        return None

    def length_limits(self, sampling: SamplingParams) -> tuple[LengthLimit, ...]:
        """What `max_length` means for prompts that are sampled so; none where nothing limits them."""
        limit = self.max_length()
        option = f"max_model_len of {type(self).__name__}"
        return () if limit is None else (LengthLimit(limit, option, sampling.max_completion_tokens),)

    def counted(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same weights, on their way to the engine."""
        for name, weight in weights:
            self.num_synced_bytes += weight.nbytes
            yield name, weight

    def router_replay_problem(self) -> str | None:
        """Why its completions cannot carry the experts that it chose (`family.router_replay`), None if they can."""
        return "its completions do not carry them"

    def environment_problem(self) -> str | None:
        """Why it cannot sample completions of several turns (`rollout.environment`), None if it can."""
        return "it samples completions of one turn"

    def generate_turns(
        self,
        family: CausalFamily,
        model: nn.Module,
        groups: Sequence[Sequence[Trajectory]],
        features: Mapping[str, Tensor],
        sampling: SamplingParams,
        seed: int,
        answer: Answer,
    ) -> None:
        """Samples the trajectories of each prompt to their ends.

        A turn that has ended is given to `answer`; others go on meanwhile. Equal seeds give equal draws, whatever the
        batch and whoever samples which.

        Args:
            family: of the model, in the precision that the engine computes in.
            model: the trainer's.
            groups: trajectories of P prompts, those of a prompt side by side.
            features: {media key: [N, D]} of the prompts; `answer` adds those of what it shows.
            sampling: of every turn.
            seed: with a prompt's id and the trajectory's number it decides the draws.
            answer: asks the environment.
        """
        raise ValueError(f"{type(self).__name__} cannot answer to rollout.environment: {self.environment_problem()}")

    def staleness_problem(self) -> str | None:
        """Why it cannot go on sampling over several updates (`rollout.max_staleness` above 1), None if it can."""
        return "its weights change between rollouts alone"

    def continuous_requests(self) -> AbstractContextManager[ContinuousRequests]:
        """Turns that are answered for as long as the run goes on, by the weights that the engine has at the time."""
        raise ValueError(f"{type(self).__name__} cannot answer to rollout.max_staleness: {self.staleness_problem()}")

    def sync_beside(
        self, family: CausalFamily, model: nn.Module, step: int, pause: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """As `sync`, while `continuous_requests` are answered.

        Args:
            family: see `sync`.
            model: see `sync`.
            step: see `sync`.
            pause: entered around the moment in which the weights change; no request is under way inside.
        """
        with pause():
            self.sync(family, model, step)

    def take_counts(self) -> dict[str, float]:
        """Further metrics of this rank since the last call, to be summed over ranks."""
        return {}

    # By default there is nothing to do.

    def check_installed(self) -> None:
        """Raises ImportError, before weights are loaded, if a package that it computes with is missing."""

    def fit_lengths(self, max_prompt_tokens: int | None, max_completion_tokens: int) -> None:
        """Has sizes that were left open hold the prompts and completions of a run; called before the first `sync`.

        Args:
            max_prompt_tokens: of the longest prompt, media included; None if it is not limited.
            max_completion_tokens: of the longest completion.
        """

    def invalidate_weights(self) -> None:
        """Has the next `sync` hand weights over whatever the step: the trainer's may have changed without one."""

    def sleep(self) -> None:
        """Lets memory go to the update: the rollouts of a step are done."""

    def close(self) -> None:
        """Ends the engine: the run is over."""


def check_environment(engine: RolloutEngine) -> None:
    """Raises ValueError if an engine cannot sample completions of several turns."""
    problem = engine.environment_problem()
    if problem is None and engine.ranks_per_engine > 1:
        problem = (
            f"its {engine.ranks_per_engine} ranks would each ask an environment of their own; set "
            "rollout.engine.init_args.tensor_parallel_size to 1"
        )
    if problem:
        raise ValueError(
            f"rollout.environment needs an engine that goes on behind what completions are shown, and "
            f"{type(engine).__name__} does not: {problem}; use longrl.engines.hf.HFEngine, or set "
            "rollout.environment to null"
        )


def prompt_seed(seed: int, prompt_id: str) -> int:
    """A 63-bit seed from the rollout's seed and the prompt's id, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{prompt_id}".encode()).digest()[:8], "big") >> 1


def sampling_ids(ids: Sequence[str], data: Axis) -> list[str]:
    """Ids that seed this rank's samples: the prompts' own, and a new one for each copy of a prompt in a rollout.

    A batch in which an epoch ends can hold a prompt twice. Copies are counted in the order in which the ranks take
    turns to read prompts, so their ids are those that one rank with all prompts would give them.

    Args:
        ids: of this rank's prompts of the rollout.
        data: ranks with other prompts; all must call it.

    Example:
        `sampling_ids(["a", "b", "a"], SINGLE_RANK)` is `["a", "b", "a (copy 1)"]`.
    """
    ids_of_ranks = [list(ids)] if data.size == 1 else data.gather(list(ids))
    num_seen: Counter[str] = Counter()
    local_ids = []
    for turn in itertools.zip_longest(*ids_of_ranks):
        for rank, prompt_id in enumerate(turn):
            if prompt_id is None:  # this rank has fewer prompts
                continue
            if rank == data.rank:
                copy = num_seen[prompt_id]
                local_ids.append(f"{prompt_id} (copy {copy})" if copy else prompt_id)
            num_seen[prompt_id] += 1
    return local_ids


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
    shuffled: RolloutRequest | None = None
    """Some of the prompts once more, with the cells of their videos in another order: their completions are compared
    with the others and never trained on."""
    shuffled_of: Sequence[int] = ()
    """For each of those the index of the prompt that it is."""


def generate_shards(
    engine: RolloutEngine,
    family: CausalFamily,
    model: nn.Module,
    request: RolloutRequest,
    features: MutableMapping[str, Tensor],
    sp_group: Axis,
    environment: EnvironmentRunner | None = None,
) -> list[GeneratedShards]:
    """This rank's shards, for each way of sampling: one call of the engine for whole prompts, one per part of a prompt.

    Behind them come those of `request.shuffled`.

    Args:
        engine: generates.
        family: of the model, in the precision that the engine computes in.
        model: the trainer's.
        request: the same on all ranks of the group.
        features: {media key: [N, D]} of the prompts; gets those of what an environment shows on this rank.
        sp_group: the ranks that share the request; those that make up one engine ask for the same.
        environment: answers the turns of completions; None: they have one.
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
            if environment is None:
                answers = engine.generate(family, model, prompts, features, params, request.seed, first)
            else:
                trajectories = environment.begin(prompts, params, first)
                with torch.autocast(_device_type(model), enabled=False):  # media are encoded as those of prompts
                    answer = environment.answers(model, features)
                engine.generate_turns(family, model, trajectories, features, params, request.seed, answer)
                answers = [[one.completion() for one in group] for group in trajectories]
            for shard, completions in zip(shards, answers, strict=True):
                if shard.first:  # the prompt's experts come with its first shard, once per group
                    completions = [replace(completion, prompt_experts=None) for completion in completions]
                generated.append((shard, Group(request.prompts[shard.prompt], completions)))
        by_sampling.append(generated)
    if request.shuffled is not None:
        by_sampling += generate_shards(engine, family, model, request.shuffled, features, sp_group, environment)
    return by_sampling


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


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
    sent = [
        (shard, group.completions, group.rewards, group.reward_parts, group.valid, group.part_weights)
        for shard, group in local
    ]
    received = sp_group.gather_list(sent, num_chunks)
    received.sort(key=lambda item: (item[0].prompt, item[0].first))
    # 2. Shards of a prompt lie side by side now: a full group is all of them end to end.
    groups = []
    for index, prompt in enumerate(prompts):
        shards = [fields for shard, *fields in received if shard.prompt == index]
        completions, rewards, reward_parts, valid, part_weights = zip(*shards, strict=True)
        all_completions = list(itertools.chain.from_iterable(completions))
        parts = {name: torch.cat([part[name] for part in reward_parts]) for name in reward_parts[0]}
        group = Group(prompt, all_completions, torch.cat(rewards), parts, torch.cat(valid))
        group.part_weights = part_weights[0]
        groups.append(group)
    return groups
