"""Watches what rewards say over the steps of a run: whether they judge at all, and whether anything can be learned."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from longrl.modules.rollout_means import rollout_metrics
from longrl.modules.trained import TrainedModule
from longrl.rewards.failures import Failure, hopeless_message
from longrl.strategies.parallel import Parallel
from longrl.types import Group

logger = logging.getLogger(__name__)

REMEDIES = {
    "all wrong": "take easier prompts, or train by SFT first, so that some answers are right",
    "all right": "take harder prompts",
    "equal in reward": "check that the reward tells good completions from bad ones, and that "
    "rollout.sampling.temperature lets them differ",
    "without any reward": "see the warnings about failed rewards above",
}
"""Why a group has no signal -> what helps."""


class RewardWatch:
    """Ends a run whose rewards judge nothing, and warns of steps without signal.

    Args:
        warn_after: steps in a row without a signal, after which it warns; 0 never.
    """

    def __init__(self, warn_after: int) -> None:
        if warn_after < 0:
            raise ValueError(f"rollout.warn_without_signal_after must be at least 0, which is never, got {warn_after}")
        self.warn_after = warn_after
        self.is_rewarded = False
        """True once some completion of this run had a reward."""
        self.failures: list[Failure] = []
        """Of this step; until some completion has a reward, of all steps."""
        self._num_sampled = 0
        self._num_silent = 0
        """Steps in a row without signal."""
        self._causes: Counter[str] = Counter()
        """Why the groups of those steps have none."""
        self._unmet: Counter[str] = Counter()
        """For each part about the form, completions of those steps."""
        self._met: set[str] = set()
        """Parts about the form that some of them met."""

    # -- rewards that judge nothing ------------------------------------------------------------------------------

    def end_if_hopeless(self, groups: Sequence[Group[Any, Any]], parallel: Parallel) -> None:
        """Ends a run of which no completion had a reward so far, where one reward is to blame.

        Every rank of the run must call it.

        Raises:
            ValueError: the reward failed in one way on all completions of several rows.
        """
        if self.is_rewarded:
            return
        self.is_rewarded = bool(parallel.world.max(sum(bool(group.valid.any()) for group in groups)))
        if self.is_rewarded:
            return
        self._num_sampled += sum(len(group.valid) for group in groups)
        failures = [failure for of_rank in parallel.world.gather(self.failures) for failure in of_rank]
        message = hopeless_message(failures, sum(parallel.dp.gather(self._num_sampled)))
        if message:
            raise ValueError(message)

    def end_if_useless(
        self,
        groups: Sequence[Group[Any, Any]],
        parallel: Parallel,
        num_steps: int,
        max_steps: int,
    ) -> None:
        """Ends a run after a step without a group of use; every rank must call it.

        Args:
            groups: all that were sampled for the step.
            parallel: the ranks.
            num_steps: so many such steps in a row, this one included.
            max_steps: so many end the run.

        Raises:
            ValueError: a reward is to blame, see `end_if_hopeless`.
            RuntimeError: there were `max_steps`.
        """
        self.end_if_hopeless(groups, parallel)
        if num_steps < max_steps:
            return
        last = {}
        for name, value in rollout_metrics(groups, parallel.dp).items():
            last[name] = round(value, 3)
        raise RuntimeError(self.uselessness(num_steps, f"The last rollout: {last}"))

    def uselessness(self, num_steps: int, said: str) -> str:
        """The message of a run that ends because so many steps in a row had no group of use."""
        failed = ""
        if self.failures:
            last = self.failures[-1]
            hint = f" ({last.hint})" if last.hint else ""
            failed = f"Reward {last.reward!r} failed last on row {last.row_id!r}, with {last.what}{hint}. "
        return (
            f"in {num_steps} steps in a row no group was of use: every prompt is always or never right, every "
            f"reward failed, or model.algorithm.select dropped every group. {said}. {failed}Check the rewards, mix in "
            "other prompts, or set model.algorithm.select to longrl.algorithms.keep_all; --ckpt_path "
            "RUN/checkpoints/last.ckpt goes on from the last checkpoint"
        )

    # -- steps without signal ------------------------------------------------------------------------------------

    def end_step(self, module: TrainedModule, sampled: Sequence[Group[Any, Any]]) -> None:
        """Warns, once in a stretch, that several steps in a row had nothing to learn from; every rank must call it.

        Args:
            module: knows whether the step had advantages.
            sampled: all groups that were drawn for it.
        """
        if self.is_rewarded:
            self.failures.clear()
        if not self.warn_after:
            return
        dp = module.parallel.dp
        had_signal = dp.max(module.has_signal)
        module.has_signal = False
        if had_signal:
            self._num_silent = 0
            self._causes.clear()
            self._unmet.clear()
            self._met.clear()
            return
        self._num_silent += 1
        for group in sampled:
            self._causes[why_silent(group)] += 1
        self._count_unmet(sampled)
        if self._num_silent != self.warn_after:
            return
        causes: Counter[str] = Counter()
        unmet: Counter[str] = Counter()
        # What any rank has met is no cause.
        for of_rank, unmet_of_rank, met in dp.gather((self._causes, self._unmet, self._met)):
            causes += of_rank
            unmet += unmet_of_rank
            self._met |= met
        for name in self._met:
            del unmet[name]
        logger.warning(silence_message(self._num_silent, causes, unmet))

    def _count_unmet(self, sampled: Sequence[Group[Any, Any]]) -> None:
        for group in sampled:
            for name, values in group.reward_parts.items():
                if "format" not in name:
                    continue
                known = values[group.valid & ~values.isnan()]  # a part that does not apply is NaN
                if (known > 0).any():
                    self._met.add(name)
                if len(known):
                    self._unmet[name] += len(known)


def why_silent(group: Group[Any, Any]) -> str:
    """Why a group has nothing to learn from: one of `REMEDIES`, or "unequal" where it alone is not to blame."""
    if not group.valid.any():
        return "without any reward"
    accuracy = group.reward_parts.get("accuracy", group.rewards)[group.valid]
    if "accuracy" in group.reward_parts and (accuracy == accuracy[:1]).all():
        if accuracy[0] <= 0:
            return "all wrong"
        if accuracy[0] >= 1:
            return "all right"
    rewards = group.rewards[group.valid]
    return "equal in reward" if (rewards == rewards[:1]).all() else "unequal"


def silence_message(num_steps: int, causes: Counter[str], unmet: Counter[str]) -> str:
    """The warning after a stretch of steps without signal.

    Args:
        num_steps: of the stretch.
        causes: why groups have no signal -> number of groups.
        unmet: parts about the form that no completion met -> number of completions.
    """
    counts = ", ".join(f"{count} {cause}" for cause, count in causes.most_common())
    helps = []
    for cause, _ in causes.most_common():
        if cause in REMEDIES:
            helps.append(REMEDIES[cause])
    for name, count in unmet.items():
        counts += f"; {name} was met by none of {count} completions"
        helps.append(f"for {name} train by SFT first, or ask for the form in data.question_template")
    remedies = "; ".join(helps)
    return (
        f"in {num_steps} steps in a row no group had a signal: all advantages were 0, and nothing was learned. "
        f"Of {causes.total()} groups: {counts}. What helps: {remedies}"
    )
