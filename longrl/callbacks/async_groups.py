"""A step's groups from prompts that are sampled over several updates (`rollout.max_staleness` above 1).

On every data-parallel rank: prompts are asked in the order of the data, k + 1 times a step's groups at most; a step
takes the finished ones, the oldest first, and waits only while there are too few. Of ranks that share prompts the first
has the thread that samples (`ContinuousSampler`); what it finds is decided there and told the others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from longrl.callbacks.async_saves import SavedPrompt, restored_prompts, saved_prompt, share_of_rank
from longrl.callbacks.async_schedule import MAX_TRIES, AskedState, age_of, num_to_ask, oldest_finished, too_old
from longrl.callbacks.rollout_steps import GroupSource, RolloutSteps, StepGroups
from longrl.callbacks.waiting_groups import SavedGroup, restored_groups, saved_group
from longrl.engines.activity import busy_share, mean_requests
from longrl.engines.continuous import ContinuousSampler, SamplingTask
from longrl.engines.rollout_engine import GeneratedShards, GenerationShard, RolloutRequest, prompt_seed
from longrl.environments.trajectory import Trajectory, begin
from longrl.features.cache import distinct_media, encode_shard
from longrl.features.rollout_features import RolloutFeatures
from longrl.modules.policy import PolicyModule
from longrl.modules.trained import data_module_of
from longrl.packing.lengths import check_lengths
from longrl.strategies.parallel import SINGLE_RANK_GRID, Parallel
from longrl.types import Group, Metrics, Prompt, SamplingParams

logger = logging.getLogger(__name__)


@dataclass
class AskedPrompt:
    """A prompt that is or will be sampled."""

    prompt: Prompt
    num_tries: int = 1
    """How often it was asked, this time included."""
    features: RolloutFeatures = field(init=False)
    """Of its media, once it is asked; and of what its completions are shown."""


class AsyncGroups(GroupSource):
    """Groups of prompts that are sampled over several updates.

    Args:
        steps: how groups are scored, and what with.
        max_staleness: k, the rollouts that may lie between a token's weights and the step that trains on it.
        max_resample_rounds: so many times a step's groups may be drawn in addition where they have nothing to learn
            from.
    """

    def __init__(self, steps: RolloutSteps, max_staleness: int, max_resample_rounds: int) -> None:
        self.steps = steps
        self.max_staleness = max_staleness
        self.max_resample_rounds = max_resample_rounds
        self._asked: dict[int, AskedPrompt] = {}
        """Prompts that the engine has, by number; the same on all ranks that share them."""
        self._queue: deque[AskedPrompt] = deque()
        """Prompts that it will get next."""
        self._num_asked = 0
        """In the whole run, on this rank: the next prompt's number."""
        self._sampler: ContinuousSampler | None = None
        """Of the first of the ranks that share prompts, once the engine has weights."""
        self._is_started = False
        self._kept: list[Group] = []
        """Of the step that is being prepared, and still there if an error ended it."""
        self._has_batch = False
        """The prompts of the step that is being prepared are among those above."""
        self._restored: list[SavedPrompt] = []
        """Prompts of a checkpoint, until there is data to render them."""
        self._restored_groups: list[SavedGroup] = []
        self._evaluation = contextlib.ExitStack()
        self._is_evaluating = False
        self._warned_of_drops = False

    # -- a step --------------------------------------------------------------------------------------------------

    @override
    def step_groups(self, module: PolicyModule, batch_prompts: Sequence[Prompt], step: int) -> StepGroups:
        """See `GroupSource`."""
        dp = module.parallel.dp
        num_groups = len(batch_prompts)
        self._has_batch = True
        self._queue.extend(AskedPrompt(prompt) for prompt in batch_prompts)  # first: an error must not lose them
        # 1. The first step begins, or goes on where a checkpoint was made.
        if not self._is_started:
            self.steps.sync(module, step)
            self._start(module)
        # 2. Prompts that came too late are given up, to be asked again; then all others go on by the new weights.
        counts = self._give_up(module, step)
        with self.steps.counted_sync(module):
            pause = functools.partial(self._pause, module.parallel)
            self.steps.engine.sync_beside(self.steps.family, module.model, step, pause)

        # 3. Ask, take what is finished, select, until there are enough groups. All ranks score together.
        groups = self._kept
        sampled: list[Group] = []
        most = (1 + self.max_resample_rounds) * num_groups
        num_takes = 0
        while True:
            self._ask(module, num_to_ask(self.max_staleness, num_groups, len(self._asked) + len(groups)))
            if not num_takes:
                counts |= self._queue_lengths()
            num_takes += 1
            missing = max(0, min(num_groups - len(groups), most - len(sampled)))
            new_groups = self._take(module, missing, step)
            sampled += new_groups
            groups += module.algorithm.select(new_groups)
            if not dp.max(len(groups) < num_groups and len(sampled) < most):
                break
        num_rounds = dp.max(-(-len(sampled) // num_groups) - 1)
        groups, self._kept = groups[:num_groups], groups[num_groups:]  # other ranks' of a checkpoint may be too many
        self._has_batch = False
        counts["rollout/engine_requests"], busy = self._take_activity()
        return StepGroups(groups, sampled, num_rounds, self._kept, counts=counts, means={"rollout/engine_busy": busy})

    @override
    def before_update(self, module: PolicyModule, step: int) -> None:
        """The engine goes on."""

    @override
    def undo_step(self) -> bool:
        """See `GroupSource`; what a step took is kept anyway, and its batch is once it has begun."""
        return not self._has_batch

    def _give_up(self, module: PolicyModule, step: int) -> Metrics:
        """Prompts that no step may train on any more are asked again, or dropped."""
        numbers = self._decided(module, too_old(self._states(module, step), self.max_staleness))
        again = []
        dropped = []
        for number in numbers:
            asked = self._asked.pop(number)
            if self._sampler is not None:
                self._sampler.cancel(number)
            if asked.num_tries < MAX_TRIES:
                again.append(AskedPrompt(asked.prompt, asked.num_tries + 1))
            else:
                dropped.append(asked.prompt.id)
        self._queue.extendleft(reversed(again))
        if dropped and not self._warned_of_drops:
            self._warned_of_drops = True
            logger.warning(
                "prompt %r is dropped: %d times its completions had not ended within %d rollouts (further ones are "
                "counted in rollout/dropped); raise rollout.max_staleness, lower "
                "rollout.sampling.max_completion_tokens, or give the engine more GPUs",
                dropped[0], MAX_TRIES, self.max_staleness,
            )  # fmt: skip
        return {"rollout/asked_again": float(len(again)), "rollout/dropped": float(len(dropped))}

    def _ask(self, module: PolicyModule, count: int) -> None:
        """Has so many further prompts sampled. Every rank must call it."""
        lacking = count - len(self._queue)
        if lacking > 0:
            drawn = data_module_of(module.trainer).draw_prompts(lacking)
            self._queue.extend(AskedPrompt(prompt) for prompt in drawn)
        asked = [self._queue.popleft() for _ in range(count)]
        numbers = [self._next_number(one) for one in asked]  # first: an error must not lose them
        self._encode(module, asked)
        with module.parallel.world.raise_on_any_rank():  # only some have a thread, which may have ended by an error
            for number, one in zip(numbers, asked, strict=True):
                seed = prompt_seed(self.steps.seed, f"prompt {number} of rank {module.parallel.dp.rank}")
                self._submit(module, number, self._begin(module, one.prompt), seed)

    def _take(self, module: PolicyModule, count: int, step: int) -> list[Group]:
        """So many finished groups, scored; waits for them. Every rank must call it."""
        with module.phases("generate"), module.parallel.world.raise_on_any_rank():
            if self._sampler is not None:
                self._sampler.wait_for(count)
        numbers = self._decided(module, oldest_finished(self._states(module, step), count))
        asked = [self._asked.pop(number) for number in numbers]
        prompts = [one.prompt for one in asked]
        tasks = [] if self._sampler is None else [self._sampler.take(number) for number in numbers]
        samplings = self.steps.samplings(module)
        generated = finished_shards(prompts, tasks, samplings, self.steps.environment.runner is not None)
        request = RolloutRequest(prompts, prompts, samplings, self.steps.seed)
        groups = self.steps.score(module, request, generated)

        # Features were kept as long as the engine might ask for them; now the step does.
        of_prompts: dict[str, Tensor] = {}
        for group, one in zip(groups, asked, strict=True):
            of_prompts |= {item.key: one.features[item.key] for item in one.prompt.media}
            self.steps.environment.share(module, [group], one.features)
        module.features.add(of_prompts)
        # Old log-probabilities are the sampler's.
        return [replace(group, carried_over=True) for group in groups]

    def _states(self, module: PolicyModule, step: int) -> list[AskedState]:
        """How far prompts are, where the thread is that samples; of other ranks nothing."""
        if self._sampler is None:
            return []
        states = []
        for number, (version, is_finished) in self._sampler.progress().items():
            states.append(AskedState(number, age_of(version, step, module.steps_per_rollout), is_finished))
        return states

    def _queue_lengths(self) -> Metrics:
        """Prompts that the engine has, and those of them that are finished."""
        progress = {} if self._sampler is None else self._sampler.progress()
        num_ready = sum(is_finished for _, is_finished in progress.values())
        return {"rollout/groups_ready": float(num_ready), "rollout/prompts_in_flight": float(len(self._asked))}

    def _take_activity(self) -> tuple[float, float]:
        """Requests under way on average since the last step, and the share of the time with any."""
        if self._sampler is None:
            return 0.0, 0.0
        spans = self._sampler.activity.take()
        return mean_requests(spans), busy_share(spans)

    def _decided(self, module: PolicyModule, numbers: list[int]) -> list[int]:
        """What the rank found that has the thread, on all ranks that share its prompts."""
        of_ranks: list[list[int]] = module.parallel.sp_group.gather(numbers)
        return of_ranks[0]

    # -- prompts to the engine -----------------------------------------------------------------------------------

    def _start(self, module: PolicyModule) -> None:
        """Begins to sample, by an engine that has weights; prompts of a checkpoint go on."""
        engine = self.steps.engine
        self._is_started = True
        if module.parallel.sp_group.rank == 0:
            limit, option = self._limit
            self._sampler = ContinuousSampler(self.steps.family, engine.continuous_requests, limit, option)
            module.phases.spans.follow(self._sampler.activity)
        render = data_module_of(module.trainer).renderer
        begin_prompt = functools.partial(self._begin, module)
        sp_group = module.parallel.sp_group
        first = []
        under_way = []
        for saved, prompt, trajectories in restored_prompts(self._restored, render, begin_prompt, sp_group):
            one = AskedPrompt(prompt, saved["num_tries"])
            if not trajectories:
                first.append(one)
                continue
            self._encode(module, [one])
            under_way.append((self._next_number(one), trajectories, saved["seed"]))
        self._queue.extendleft(reversed(first))
        self._kept += restored_groups(self._restored_groups, render, sp_group)
        self._restored = []  # they are among the others from here on
        self._restored_groups = []
        with module.parallel.world.raise_on_any_rank():
            for number, trajectories, seed in under_way:
                self._submit(module, number, trajectories, seed)

    @property
    def _limit(self) -> tuple[int, str]:
        """Tokens of prompt and completion that the engine takes, and the option that sets them."""
        engine = self.steps.engine
        return engine.max_length() or sys.maxsize, f"max_model_len of {type(engine).__name__}"

    def _next_number(self, one: AskedPrompt) -> int:
        number = self._num_asked
        self._num_asked += 1
        self._asked[number] = one
        return number

    def _begin(self, module: PolicyModule, prompt: Prompt) -> list[Trajectory]:
        """A prompt's completions before their first token, for each way of sampling."""
        runner = self.steps.environment.runner
        trajectories = []
        for sampling in self.steps.samplings(module):
            (group,) = begin([prompt], sampling, 1) if runner is None else runner.begin([prompt], sampling)
            trajectories += group
        return trajectories

    def _encode(self, module: PolicyModule, asked: Sequence[AskedPrompt]) -> None:
        """Features of prompts, each with its own, so that they are let go of with it."""
        if not asked:
            return
        features = self.steps.encode(module, [one.prompt for one in asked])
        for one in asked:
            own = {item.key: features[item.key] for item in one.prompt.media}
            one.features = RolloutFeatures(own, module.features)

    def _submit(self, module: PolicyModule, number: int, trajectories: list[Trajectory], seed: int) -> None:
        """Hands a prompt to the thread, where it is."""
        if self._sampler is None:
            return
        one = self._asked[number]
        limit, option = self._limit
        check_lengths([one.prompt], self.steps.sampling, limit=limit, option=option)
        encode_shown(module, trajectories, one.features)
        runner = self.steps.environment.runner
        answer = None if runner is None else runner.answers(module.model, one.features)
        self._sampler.submit([SamplingTask(number, trajectories, one.features, seed, answer)])

    # -- evaluation, checkpoints, the end ------------------------------------------------------------------------

    @contextlib.contextmanager
    def _pause(self, parallel: Parallel) -> Iterator[None]:
        """No rank has a request under way inside. Every rank must enter."""
        with contextlib.ExitStack() as stack:
            with parallel.world.raise_on_any_rank():  # and none goes on before all have paused
                if self._sampler is not None:
                    stack.enter_context(self._sampler.pause())
            yield

    @override
    def before_evaluation(self, parallel: Parallel) -> None:
        """Leaves the engine to an evaluation, until `after_evaluation`; every rank must call it."""
        if not self._is_evaluating:
            self._is_evaluating = True
            self._evaluation.enter_context(self._pause(parallel))

    @override
    def after_evaluation(self) -> None:
        """Goes on."""
        self._is_evaluating = False
        self._evaluation.close()

    @override
    def save(self, parallel: Parallel) -> dict[str, Any]:
        """All prompts that were asked and not trained on; every rank must call it."""
        saved = list(self._restored)
        with self._pause(parallel):
            if self._sampler is not None:
                with self._sampler.held():
                    tasks = {task.number: task for task in self._sampler.tasks()}
                    for number in sorted(self._asked):
                        one = self._asked[number]
                        task = tasks.get(number)
                        saved.append(saved_prompt(one.prompt, one.num_tries, task))
                        if task is not None and self.steps.lengths is not None:
                            length = task.trajectories[0].sampling.max_completion_tokens
                            saved[-1]["max_completion_tokens"] = length
            saved += [saved_prompt(one.prompt, one.num_tries, None) for one in self._queue]
        kept = self._restored_groups + [saved_group(group) for group in self._kept]
        by_rank = parallel.dp.gather((self._num_asked, saved, kept))
        num_asked, all_saved, all_kept = zip(*by_rank, strict=True)
        # The numbers of prompts decide their seeds, whatever the number of ranks that goes on.
        return {"asked": {"num_asked": max(num_asked), "prompts": list(all_saved), "kept": list(all_kept)}}

    @override
    def load(self, saved: Mapping[str, Any], parallel: Parallel) -> None:
        """Takes what this rank had saved, or with another number of ranks its part of what all had."""
        if "asked" not in saved:
            logger.warning("groups that waited for this step are left out: rollout.max_staleness was not above 1")
            return
        self._num_asked = saved["asked"]["num_asked"]
        self._restored = share_of_rank(saved["asked"]["prompts"], parallel.dp)
        self._restored_groups = share_of_rank(saved["asked"]["kept"], parallel.dp)

    @override
    def close(self) -> None:
        """Ends the thread."""
        self.after_evaluation()
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None
        self._queue.extendleft(reversed(self._asked.values()))  # nobody samples them any more
        self._asked.clear()
        self._is_started = False


def finished_shards(
    prompts: Sequence[Prompt], tasks: Sequence[SamplingTask], samplings: Sequence[SamplingParams], has_turns: bool
) -> list[GeneratedShards]:
    """Finished completions as shards of whole prompts, for each way of sampling; of no tasks none.

    Args:
        prompts: P.
        tasks: of these, on the rank that sampled.
        samplings: every one gives a list of shards; their trajectories lie one after the other.
        has_turns: whether completions carry their turns: those of an environment do.
    """
    by_sampling: list[GeneratedShards] = []
    start = 0
    for sampling in samplings:
        stop = start + sampling.num_generations
        shards: GeneratedShards = []
        for index, task in enumerate(tasks):
            completions = [trajectory.completion() for trajectory in task.trajectories[start:stop]]
            if not has_turns:
                completions = [replace(completion, turns=()) for completion in completions]
            shards.append((GenerationShard(index, 0, len(completions)), Group(prompts[index], completions)))
        by_sampling.append(shards)
        start = stop
    return by_sampling


def encode_shown(module: PolicyModule, trajectories: Sequence[Trajectory], features: RolloutFeatures) -> None:
    """Encodes what restored trajectories were shown, on this rank alone, as it was encoded when they were shown it."""
    missing = [item for item in distinct_media(trajectories) if item.key not in features]
    with torch.no_grad():
        for item in missing:
            features[item.key] = encode_shard(module.family, module.model, [item], SINGLE_RANK_GRID, one_by_one=True)
