"""A policy's answers to a benchmark, scored and reported; an evaluation may be killed at any time.

Answers go to an append-only log, under keys that name all that decided them. What is written at the end is a function
of that log and the questions, so a run that was killed and started again leaves the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from longrl.evaluation.answering import Answer, AnswerStore, Item, Policy, portable, question_key
from longrl.evaluation.outcomes import Outcome, judge_answers, make_outcome
from longrl.evaluation.records import check_breakdowns
from longrl.evaluation.result_files import EvaluationFiles, check_extends, describe_evaluation, write_evaluation
from longrl.io.progress import item_progress
from longrl.rewards import RewardSum
from longrl.types import SamplingParams, UnusableSample

if TYPE_CHECKING:
    from longrl.datamodules.loading.render import RowRenderer
    from longrl.datamodules.longvideo_reason import LongVideoReason
    from longrl.evaluation.comparison import RunRecords
    from longrl.types import Row

logger = logging.getLogger(__name__)

GREEDY = SamplingParams(num_generations=1, max_completion_tokens=1024, temperature=0.0)
WITH_VIDEO = "video"
BLIND = "no video"


@dataclass(frozen=True)
class EvaluationConfig:
    """Who answers, how often, under which conditions, and how it is reported; the questions are `data`'s."""

    policy: Policy
    """`longrl.evaluation.local_policy.LocalPolicy` or `longrl.evaluation.endpoint_policy.EndpointPolicy`."""
    out: str
    """Folder of everything: answers, samples.jsonl, results.json, report.html. One for every policy and way of asking:
    an evaluation goes on in its folder and may add conditions, but does not replace another's results."""
    name: str = "evaluation"
    """Name of the benchmark, for the report."""
    sampling: SamplingParams = GREEDY
    """Greedy by default; leave room for the reasoning, or `truncation_rate` says what was cut off."""
    seed: int = 0
    """Seed of the sampling."""
    frames: list[int] = field(default_factory=list)
    """Numbers of frames to compare, e.g. [16, 32, 64]; without any, `data.video` decides."""
    blind_baseline: bool = False
    """Ask all questions once more without their media."""
    breakdowns: list[str] = field(default_factory=list)
    """Fields of the rows' metadata to score by, e.g. [duration, domain, task_type] for VideoMME."""
    reward: RewardSum | None = None
    """Judges tasks that have no judge of their own (open_ended), as in configs/reward/judge.yaml."""
    against: str | None = None
    """Folder of another evaluation or of a `test` run, to compare with question by question."""
    num_cards: int = 8
    """Questions that the report shows with what was answered."""

    def __post_init__(self) -> None:
        if len(set(self.frames)) < len(self.frames) or any(count < 1 for count in self.frames):
            raise ValueError(f"--frames must be different numbers of at least 1, got {self.frames}")


@dataclass(frozen=True)
class Condition:
    """One way to ask all questions."""

    name: str
    renderer: RowRenderer
    num_frames: int | None = None


class Evaluation:
    """Asks what is not answered yet, then writes samples, results and report.

    Under torchrun every process answers its part of the batches, and none writes: the same command alone does.

    Args:
        config: see `EvaluationConfig`.
        data: has the questions, as its `test` source.
    """

    def __init__(self, config: EvaluationConfig, data: LongVideoReason) -> None:
        self.config, self.data = config, data
        self.folder = Path(config.out).expanduser()
        self.part, self.num_parts = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def run(self) -> EvaluationFiles | None:
        """Does everything.

        Returns:
            What was written; None in a process that answered a part.

        Raises:
            ValueError: results of another evaluation in `out`, no questions, too many that cannot be asked
                (`data.max_skipped_share`), an endpoint that refuses every call or a spent budget. What was answered
                until then is on disk.
        """
        # 1. What may be wrong is found before hours of work.
        config, policy = self.config, self.config.policy
        policy.check(config.sampling)
        if config.reward is not None:
            config.reward.prepare()
        against = self._read_against()
        self._read_rows()
        self.folder.mkdir(parents=True, exist_ok=True)
        policy.prepare(self.folder)

        # 2. Ask what is not answered yet.
        store = AnswerStore(self.folder / "answers")
        try:
            conditions = self.conditions()
            renderers = {condition.name: condition.renderer for condition in conditions}
            description = describe_evaluation(
                config.name, policy.identity(), config.sampling, config.seed, self.data, renderers
            )
            check_extends(self.folder, description)
            answered = [(condition, *self._answers(condition, store)) for condition in conditions]
        finally:
            store.close()
            policy.close()
        if self.num_parts > 1:
            logger.warning(
                "part %d of %d is answered; run the command alone for the results", self.part, self.num_parts
            )
            return None

        # 3. Score and report.
        outcomes = [self._outcome(*each) for each in answered]
        return write_evaluation(
            self.folder, description, self.rows, outcomes, num_cards=config.num_cards, against=against
        )

    def _read_against(self) -> tuple[str, RunRecords] | None:
        """The run to compare with, as it is at the start."""
        from longrl.evaluation.comparison import read_run

        against = self.config.against
        if against is None:
            return None
        if Path(against).expanduser().resolve() == self.folder.resolve():
            raise ValueError(
                f"--against={against} is the folder of --out, and a run is not compared with itself; give another --out"
            )
        return against, read_run(against)

    def _read_rows(self) -> None:
        if not self.data.sources["test"]:
            raise ValueError("`evaluate` reads data.test, which is not set; give it a file or a hub id")
        self.data.skipped_dir = self.data.skipped_dir or str(self.folder)
        self.data.read(("test",))
        check_breakdowns(self.rows, self.config.breakdowns)

    @property
    def rows(self) -> Sequence[Row]:
        """Rows of all questions."""
        return self.data.datasets["test"].rows

    def conditions(self) -> list[Condition]:
        """Conditions of the config: so many frames each, or `data.video` as it is; last, without media."""
        plain = replace(self.data.renderer, blind_share=0.0, stored=self.config.policy.stored())
        if plain.blind and self.config.frames:
            raise ValueError(f"--frames={self.config.frames} shows frames and data.blind none; set one of them")
        # Whatever the rule for frames is, a blind policy is shown none.
        blind = Condition(BLIND, replace(plain, blind=True, video=type(plain.video)()))
        if plain.blind:
            return [blind]
        conditions = [
            Condition(f"{count} frames", _with_frames(plain, count), count) for count in self.config.frames
        ] or [Condition(WITH_VIDEO, plain)]
        return [*conditions, blind] if self.config.blind_baseline else conditions

    # -- asking --------------------------------------------------------------------------------------------------

    def _answers(self, condition: Condition, store: AnswerStore) -> tuple[dict[int, Answer], dict[int, UnusableSample]]:
        """The answers under a condition, and why questions have none, by the index of their row."""
        identity = {
            "policy": self.config.policy.identity(),
            "sampling": dataclasses.asdict(self.config.sampling),
            "seed": self.config.seed,
            "reading": portable(condition.renderer.identity()),
        }
        keys = [question_key(row, identity, condition.renderer) for row in self.rows]
        size = self.data.eval_prompts_per_batch
        local = (index for index in range(len(keys)) if index // size % self.num_parts == self.part)
        missing = [index for index in local if keys[index] not in store]
        skipped: dict[int, UnusableSample] = {}
        if missing:
            num_answered = len(keys) - len(missing)
            logger.info("%s: %d of %d questions are answered already", condition.name, num_answered, len(keys))
            self._ask(condition, keys, missing, store, skipped)
        return {index: store[key] for index, key in enumerate(keys) if key in store}, skipped

    def _ask(
        self,
        condition: Condition,
        keys: Sequence[str],
        missing: Sequence[int],
        store: AnswerStore,
        skipped: dict[int, UnusableSample],
    ) -> None:
        from longrl.datamodules.loading.loader import usable_items

        skips = self.data.skips("test")
        with item_progress() as progress:
            task = progress.add_task(condition.name, total=len(keys), completed=len(keys) - len(missing))

            def save(answers: Mapping[int, Answer | UnusableSample]) -> None:
                store.add({keys[index]: item for index, item in answers.items() if isinstance(item, Answer)})
                for index, item in answers.items():
                    if isinstance(item, UnusableSample):
                        skipped[index] = item
                        usable_items([item], skips)
                progress.advance(task, len(answers))

            def skip(item: UnusableSample) -> None:
                skipped[item.index] = item
                progress.advance(task)

            batches = self._batches(condition, missing, skip)
            self.config.policy.answer(batches, self.config.sampling, self.config.seed, save)

    def _batches(
        self, condition: Condition, missing: Sequence[int], skip: Callable[[UnusableSample], None]
    ) -> Iterator[list[Item]]:
        """Prompts of the missing rows; a batch's rows are neighbours in the file, whatever is missing."""
        from longrl.datamodules.loading.loader import RenderedRows, usable_items

        size, skips = self.data.eval_prompts_per_batch, self.data.skips("test")
        options = replace(self.data.loader_options, prefetch_prompts=size)
        items = options.render(RenderedRows(self.rows, condition.renderer), missing)
        for _, indices in itertools.groupby(missing, key=lambda index: index // size):
            batch: list[Item] = []
            for index in indices:
                item = next(items)
                if isinstance(item, UnusableSample):
                    skip(item)
                batch += [(index, prompt) for prompt in usable_items([item], skips)]
            if batch:
                yield batch

    def _outcome(
        self, condition: Condition, answers: Mapping[int, Answer], skipped: Mapping[int, UnusableSample]
    ) -> Outcome:
        breakdowns = self.config.breakdowns
        return make_outcome(
            condition.name,
            self.rows,
            answers,
            judge_answers(self.rows, answers, breakdowns, self.config.reward),
            skipped,
            breakdowns=breakdowns,
            num_frames=condition.num_frames,
            blind=condition.renderer.blind,
        )


def _with_frames(renderer: RowRenderer, count: int) -> RowRenderer:
    """The renderer that shows so many frames of every video, fewer only of one that has fewer."""
    video = renderer.video
    fewest, most = min(video.min_frames, count), max(video.max_frames, count)
    return replace(renderer, video=replace(video, fps=None, num_frames=count, min_frames=fewest, max_frames=most))
