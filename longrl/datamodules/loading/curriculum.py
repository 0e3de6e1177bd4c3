"""`Curriculum`: which training rows come next, and how much of their videos is shown, as a run goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from lightning.pytorch import Trainer

from longrl.datamodules.loading.drawn_order import DrawnOrder
from longrl.datamodules.loading.learning_progress import LearningProgress, SourceProgress, source_names
from longrl.datamodules.loading.mixing import DataSource
from longrl.datamodules.loading.pass_rates import EVERY_ROW, PassRates, RowPool, initial_rates
from longrl.datamodules.loading.row_marks import drawn_index
from longrl.datamodules.loading.row_order import RowOutcome
from longrl.datamodules.loading.schedules import StepBudgets, VideoSchedule
from longrl.datamodules.media.sampling import VideoSampling
from longrl.io.number_ranges import check_ranges
from longrl.models.reading import RendersPrompts
from longrl.types import Group, Row


@dataclass(frozen=True)
class Curriculum:
    """Which training rows come next, by how they were answered, and which frames they show, by optimizer step.

    Example:
        `Curriculum(pass_rates=PassRates(low=0.1, high=0.9))`
    """

    pass_rates: PassRates | None = None
    """Draws rows by how often the policy answers them right."""
    learning_progress: LearningProgress | None = None
    """Weighs the sources of `data.train` by how fast their mean reward changes."""
    video: VideoSchedule | None = None
    """How many frames videos have, by optimizer step."""
    delay_steps: int = 2
    """The rows of step s are drawn by what was known after step s - `delay_steps`: with loader workers, which render
    ahead, at least 2. It does not depend on their speed."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.curriculum.", delay_steps=(1, 1000))
        if not (self.pass_rates or self.learning_progress or self.video):
            raise ValueError("data.curriculum needs pass_rates, learning_progress or video; leave it out for none")

    @property
    def draws_rows(self) -> bool:
        """True if it decides which rows come next."""
        return self.pass_rates is not None or self.learning_progress is not None

    @property
    def needs_rewards(self) -> bool:
        """True if what comes next follows from rewards of the run."""
        return self.learning_progress is not None or (self.pass_rates is not None and self.pass_rates.online)

    def check(
        self,
        stage: str,
        sources: Sequence[DataSource],
        video: VideoSampling,
        prompts_per_batch: int,
        rendered_ahead: int,
    ) -> None:
        """Refuses what a run cannot do, before anything is read.

        Args:
            stage: `data.stage`.
            sources: of `data.train`.
            video: the options `data.video`.
            prompts_per_batch: of each rank.
            rendered_ahead: prompts that loader workers may hold; 0 without workers.

        Raises:
            ValueError: there are no rewards, no sources to weigh, workers render further ahead than rows are drawn, or
                a step would show more than `data.video` says.
        """
        if self.video is not None:
            self.video.check(video)
        if self.needs_rewards and stage != "rl":
            raise ValueError(
                f"data.curriculum follows rewards, which data.stage={stage} has none of; take away learning_progress, "
                "and set pass_rates.online=false with pass_rates.initial, or data.stage=rl"
            )
        if self.learning_progress is not None and len(sources) == 1:
            raise ValueError(
                f"data.curriculum.learning_progress weighs the sources of data.train, which has one: "
                f"{sources[0].source}; list several, or take learning_progress away"
            )
        ahead = self.rows_ahead(prompts_per_batch)
        if self.draws_rows and rendered_ahead > ahead:
            needed = 1 + math.ceil(rendered_ahead / prompts_per_batch)
            raise ValueError(
                f"data.curriculum.delay_steps={self.delay_steps} draws {ahead} rows ahead, but data.num_workers and "
                f"data.prefetch_prompts render up to {rendered_ahead}; raise data.curriculum.delay_steps to {needed}, "
                f"or lower data.prefetch_prompts"
            )

    def rows_ahead(self, prompts_per_batch: int) -> int:
        """Rows of each rank that are drawn before those of the step in hand have been learned from."""
        return (self.delay_steps - 1) * prompts_per_batch

    def order(
        self,
        rows: Sequence[Row],
        sizes: Sequence[int],
        sources: Sequence[DataSource],
        seed: int,
        rank: int,
        world_size: int,
        prompts_per_batch: int,
    ) -> DrawnOrder:
        """The order of the training rows.

        Args:
            rows: all, those of one source after those of another.
            sizes: rows of each source.
            sources: of `data.train`.
            seed: of the draws.
            rank: data-parallel.
            world_size: data-parallel.
            prompts_per_batch: of each rank.
        """
        rule = self.pass_rates or EVERY_ROW
        rates = initial_rates(rule.initial, rows)
        # Sources that nothing weighs are one.
        is_mixed = self.learning_progress is not None or any(one.weight is not None for one in sources)
        of_pools = list(sizes) if is_mixed else [len(rows)]
        given = [one.weight or 1.0 for one in sources] if is_mixed else [1.0]
        weights = [weight / math.fsum(given) for weight in given]
        progress = None
        if self.learning_progress is not None:
            names = source_names([one.source for one in sources])
            progress = SourceProgress(self.learning_progress, names, weights)
        borders = pairwise([0, *accumulate(of_pools)])
        return DrawnOrder(
            [RowPool(rule, rates[start:stop]) for start, stop in borders],
            seed,
            rank,
            world_size,
            ahead=self.rows_ahead(prompts_per_batch),
            weights=weights,
            progress=progress,
            rates_learn=rule.online,
        )


def group_outcomes(groups: Sequence[Group[Any, Any]]) -> list[RowOutcome]:
    """What groups say of the rows that a curriculum drew; nothing of a group without a valid completion.

    The pass rate is the mean of the part `accuracy`, or else of the reward, cut to 0 and 1.
    """
    outcomes = []
    for group in groups:
        row = drawn_index(group.prompt.row)
        rewards = group.rewards[group.valid]
        if row is None or not len(rewards):
            continue
        scores = rewards
        accuracy = group.reward_parts.get("accuracy")
        if accuracy is not None:
            known = accuracy[group.valid & ~accuracy.isnan()]
            scores = known if len(known) else rewards
        rate = min(max(float(scores.double().mean()), 0.0), 1.0)
        outcomes.append(RowOutcome(row, rate, float(rewards.double().mean())))
    return outcomes


def step_budgets(
    curriculum: Curriculum | None,
    family: RendersPrompts,
    video: VideoSampling,
    trainer: Trainer | None,
    prompts_per_batch: int,
) -> StepBudgets | None:
    """Which frames each step shows; None where that does not change.

    Args:
        curriculum: of the run.
        family: whose temporal patches numbers of frames on a line are rounded to.
        video: the options `data.video`.
        trainer: says which step it is; None is the first.
        prompts_per_batch: of each rank.

    Raises:
        ValueError: a step would show more than `data.video` says, or what it cannot mean.
    """
    if curriculum is None or curriculum.video is None:
        return None
    patch = family.temporal_patch_size
    multiple = math.lcm(patch if isinstance(patch, int) else patch.fewest, video.multiple_of)
    curriculum.video.check(video, multiple)

    def step() -> int:
        return 0 if trainer is None else trainer.global_step

    def steps_per_batch() -> int:
        module: Any = None if trainer is None else trainer.lightning_module
        return module.steps_per_rollout if module is not None and module.is_rl() else 1

    return StepBudgets(curriculum.video, multiple, step, steps_per_batch, prompts_per_batch)
