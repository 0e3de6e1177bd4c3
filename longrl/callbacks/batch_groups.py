"""A step's groups from the prompts of its batch: sampled before the update, or one step ahead during the last one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

from typing_extensions import override

from longrl.callbacks.background_rollout import BackgroundRollout, run_in_background
from longrl.callbacks.frame_order import shuffled_media
from longrl.callbacks.rollout_steps import GroupSource, RolloutSteps, StepGroups
from longrl.callbacks.waiting_groups import WaitingGroups
from longrl.engines.rollout_engine import GeneratedShards, RolloutRequest, generate_shards
from longrl.engines.server_pool import lost_servers
from longrl.features.rollout_features import RolloutFeatures
from longrl.modules.policy import PolicyModule
from longrl.modules.trained import data_module_of
from longrl.strategies.parallel import Parallel
from longrl.types import Group, Prompt

logger = logging.getLogger(__name__)


class BatchGroups(GroupSource):
    """Groups of a step that are sampled together, by the weights of one step.

    Args:
        steps: how groups are sampled.
        ahead: sample the next step's groups during the update (`rollout.max_staleness: 1`).
        max_resample_rounds: further batches of prompts that a step may draw.
    """

    def __init__(self, steps: RolloutSteps, ahead: bool, max_resample_rounds: int) -> None:
        self.steps = steps
        self.ahead = ahead
        self.max_resample_rounds = max_resample_rounds
        self.waiting = WaitingGroups()
        self._background: BackgroundRollout | None = None
        """Under way during the update."""
        self._upcoming: Sequence[Prompt] = ()
        """To be sampled during the update."""
        self._before: tuple[list[Group], list[Group] | None, list[Prompt], int] | None = None
        """What waited before the step, and the number of rollouts; None until it has begun."""

    @override
    def step_groups(self, module: PolicyModule, batch_prompts: Sequence[Prompt], step: int) -> StepGroups:
        """See `GroupSource`."""
        dp = module.parallel.dp
        num_groups = len(batch_prompts)
        draw_prompts = data_module_of(module.trainer).draw_prompts
        prompts = batch_prompts

        self._before = None
        # 1. What waits: groups too many for the last step, and those sampled ahead during its update. Then the prompts
        #    of this batch are sampled during the next one.
        waiting = self.waiting
        if waiting.restored:
            waiting.render_restored(data_module_of(module.trainer).renderer, dp, module.parallel.sp_group)
        if self._background is not None:
            waiting.prefetched = self._finish_background(self._background)
        self._before = (list(waiting.carried), waiting.prefetched, waiting.unasked, self.steps.num_rollouts)
        groups = [replace(group, carried_over=True) for group in waiting.carried]
        self._upcoming = ()
        new_groups: list[Group] | None = None
        if waiting.prefetched is not None:
            new_groups = [replace(group, carried_over=True) for group in waiting.prefetched]
            self._upcoming = batch_prompts
            waiting.prefetched = None
        elif waiting.unasked:
            prompts, waiting.unasked = waiting.unasked, []
            self._upcoming = batch_prompts
        elif self.ahead:
            self._upcoming = draw_prompts(num_groups)

        sampled: list[Group] = []
        num_rounds = 0
        while True:
            if new_groups is None:
                request = self.steps.next_request(module, prompts)
                # 2. Encode the prompts' media: every rank its shard of the frames.
                features = self.steps.encode(module, prompts, shuffled_media(request))
                # 3. Sync: hand the weights of this step over, unless the engine has them.
                self.steps.sync(module, step)
                # 4. Generate this rank's shards of the completions.
                generated = self.steps.generate(module, request, features)
                # 5. Reward them, and gather the groups.
                new_groups = self._score(module, request, generated, features)
            sampled += new_groups
            # 6. Select the groups that have something to learn from.
            groups += module.algorithm.select(new_groups)
            # 7. Resample: all ranks go on as long as one lacks groups, for they gather weights together.
            if not dp.max(len(groups) < num_groups) or num_rounds == self.max_resample_rounds:
                break
            prompts = draw_prompts(num_groups)
            num_rounds += 1
            new_groups = None

        # 8. The step's groups; more of them wait for the next step.
        waiting.carried = groups[num_groups:]
        return StepGroups(groups[:num_groups], sampled, num_rounds, waiting.carried)

    @override
    def before_update(self, module: PolicyModule, step: int) -> None:
        """The engine: on with the next step's groups, or at rest."""
        if self.ahead:
            self._background = self._start_background(module, self._upcoming, step)
        self.steps.engine.sleep()

    @override
    def undo_step(self) -> bool:
        """See `GroupSource`."""
        self._background = None
        waiting = self.waiting
        if self._before is not None:
            waiting.carried, waiting.prefetched, waiting.unasked, self.steps.num_rollouts = self._before
        return True

    def _score(
        self,
        module: PolicyModule,
        request: RolloutRequest,
        generated: Sequence[GeneratedShards],
        features: RolloutFeatures,
    ) -> list[Group]:
        groups = self.steps.score(module, request, generated)
        self.steps.environment.share(module, groups, features)
        return groups

    # -- groups sampled during the update ------------------------------------------------------------------------

    def _start_background(self, module: PolicyModule, prompts: Sequence[Prompt], step: int) -> BackgroundRollout:
        """Has the engine generate from the weights as they are, before the update changes them."""
        steps = self.steps
        request = steps.next_request(module, prompts)
        features = steps.encode(module, prompts, shuffled_media(request))
        steps.sync(module, step)
        sp_group = module.parallel.sp_group
        arguments = (steps.engine, steps.family, module.model, request, features, sp_group, steps.environment.runner)
        generated = run_in_background(generate_shards, *arguments)
        return BackgroundRollout(module, request, features, generated)

    def _finish_background(self, background: BackgroundRollout) -> list[Group]:
        """Waits for the rollout under way and has it scored. Every rank must call it."""
        self._background = None  # first, for an error below must not be met again by a checkpoint
        module = background.module
        try:
            with module.phases("generate"), module.parallel.world.raise_on_any_rank():
                generated = background.generated.result()
        except Exception:  # its prompts are asked again, with the same seeds
            self.waiting.unasked = list(background.request.prompts)
            self.steps.num_rollouts -= 1
            raise
        return self._score(module, background.request, generated, background.features)

    # -- evaluation, checkpoints, the end ------------------------------------------------------------------------

    @override
    def before_evaluation(self, parallel: Parallel) -> None:
        """Has nothing under way that reads the weights which `sync` may replace."""
        if self._background is not None:
            wait([self._background.generated])

    @override
    def after_evaluation(self) -> None:
        """Nothing to go on with."""

    @override
    def save(self, parallel: Parallel) -> dict[str, Any]:
        """What waits for a later step; every rank must call it."""
        if self._background is not None:
            try:
                self.waiting.prefetched = self._finish_background(self._background)
            except Exception as error:
                if lost_servers(error) is None:
                    raise
                logger.warning("the prompts that were under way are saved, to be asked again: %s", error)
        return {"waiting": parallel.dp.gather(self.waiting.save())}

    @override
    def load(self, saved: Mapping[str, Any], parallel: Parallel) -> None:
        """Takes what this rank had saved, or with another number of ranks its part of what all had."""
        if "waiting" in saved:
            self.waiting.load(saved["waiting"], parallel.dp)
        else:
            logger.warning("prompts that were under way are left out: rollout.max_staleness was above 1")

    @override
    def close(self) -> None:
        """Nothing to end."""
