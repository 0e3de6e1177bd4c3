"""A policy's answers to a benchmark, scored and reported; an evaluation may be killed at any time.

Answers go to an append-only log, under keys that name all that decided them. What is written at the end is a function
of that log and the questions, so a run that was killed and started again leaves the same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from longrl.datamodules.loading.loader import RenderedRows, usable_items
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.evaluation.answering import Answer, AnswerStore, Item, Policy, make_portable, question_key
from longrl.evaluation.averages import check_averages
from longrl.evaluation.comparison import read_run
from longrl.evaluation.outcomes import SHUFFLED, judge_answers, make_outcome
from longrl.evaluation.protocol import OWN_PROTOCOL, PublishedProtocol
from longrl.evaluation.records import check_breakdowns
from longrl.evaluation.result_files import EvaluationFiles, check_extends, describe_evaluation, write_evaluation
from longrl.evaluation.submissions import write_submission
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges
from longrl.io.progress import item_progress
from longrl.rewards import RewardSum
from longrl.types import Row, SamplingParams, UnusableSample

logger = logging.getLogger(__name__)

GREEDY = SamplingParams(num_generations=1, max_completion_tokens=1024, temperature=0.0)
WITH_VIDEO = "video"
BLIND = "no video"


@dataclass(frozen=True)
class EvaluationConfig:
    """Options of an evaluation: who answers, how often, under which conditions, and how it is reported.

    The questions are `data`'s.
    """

    policy: Policy
    """`longrl.evaluation.local_policy.LocalPolicy` or `longrl.evaluation.endpoint_policy.EndpointPolicy`."""
    out: str
    """Folder of everything: answers, samples.jsonl, results.json, report.html. One for every policy and way of asking:
    an evaluation goes on in its folder and may add conditions, but does not replace another's results."""
    name: str = "evaluation"
    """Name of the benchmark, for the report."""
    protocol: PublishedProtocol = OWN_PROTOCOL
    """Whose way of asking this is, and its own scoring as a second score; configs/eval/ has published ones."""
    sampling: SamplingParams = GREEDY
    """Greedy by default; leave room for the reasoning, or `truncation_rate` says what was cut off."""
    seed: int = 0
    """Seed of the sampling."""
    frames: list[int] = field(default_factory=list)
    """Numbers of frames to compare, e.g. [16, 32, 64]; without any, `data.video` decides."""
    blind_baseline: bool = False
    """Ask all questions once more without their media."""
    shuffled_baseline: bool = False
    """Ask all questions once more with the temporal patches of their videos in another order, the same for a question
    in every run: what is lost is what order is needed for."""
    breakdowns: list[str] = field(default_factory=list)
    """Fields of the rows' metadata to score by, e.g. [duration, domain, task_type] for VideoMME."""
    reward: RewardSum | None = None
    """Judges tasks that have no judge of their own (open_ended), as in configs/reward/judge.yaml."""
    against: str | None = None
    """Folder of another evaluation or of a `test` run, to compare with question by question."""
    num_cards: int = 8
    """Questions that the report shows with what was answered."""

    def __post_init__(self) -> None:
        check_ranges(self, "--", num_cards=NOT_NEGATIVE)
        if len(set(self.frames)) < len(self.frames) or any(count < 1 for count in self.frames):
            raise ValueError(f"--frames must be different numbers of at least 1, got {self.frames}")


@dataclass(frozen=True)
class Condition:
    """One way to ask all questions."""

    name: str
    renderer: RowRenderer
    num_frames: int | None = None

    @property
    def shuffled(self) -> Condition:
        """The same with shuffled frames; charts of accuracy over frames leave it out."""
        return Condition(f"{self.name}{SHUFFLED}", replace(self.renderer, shuffle_frames=True))


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
        if config.frames and not policy.samples_frames:
            raise ValueError(
                f"--frames={config.frames} samples frames here, and the policy's video_as=video leaves that to its "
                "server; set video_as to frames, or tell the server by endpoint.extra"
            )
        if self.data.renderer.selection is not None and not policy.samples_frames:
            raise ValueError(
                "data.selection chooses frames here, and the policy's video_as=video leaves that to its server; set "
                "video_as to frames, or leave data.selection out"
            )
        self._check_shuffled()
        protocol = config.protocol
        rule, figures, form = protocol.scoring_rule(), protocol.figures_function(), protocol.submission_form()
        if config.reward is not None:
            config.reward.prepare()
        against = None
        if config.against is not None:
            if Path(config.against).expanduser().resolve() == self.folder.resolve():
                raise ValueError(
                    f"--against={config.against} is the folder of --out, and a run is not compared with itself; give "
                    "another --out"
                )
            # As it is now: this evaluation may take hours, and the other one may go on beside it.
            against = config.against, read_run(config.against)
        if not self.data.sources["test"]:
            raise ValueError("`evaluate` reads data.test, which is not set; give it a file or a hub id")
        self.data.skipped_dir = self.data.skipped_dir or str(self.folder)
        self.data.read(("test",))
        check_breakdowns(self.rows, config.breakdowns)
        check_averages(self.rows, protocol.mean_over, protocol.groups)
        self.folder.mkdir(parents=True, exist_ok=True)
        policy.fit_lengths(self.data.renderer.max_prompt_tokens, config.sampling)
        policy.prepare(self.folder)

        # 2. Ask what is not answered yet.
        store = AnswerStore(self.folder / "answers")
        try:
            conditions = self.conditions()
            renderers = {condition.name: condition.renderer for condition in conditions}
            description = describe_evaluation(
                config.name, policy.identity(), config.sampling, config.seed, self.data, renderers, protocol
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
        outcomes = []
        for condition, answers, skipped in answered:
            judged = judge_answers(self.rows, answers, config.breakdowns, config.reward, rule)
            outcome = make_outcome(
                condition.name, self.rows, answers, judged, skipped, breakdowns=config.breakdowns,
                num_frames=condition.num_frames, blind=condition.renderer.blind, figures=figures,
                mean_over=protocol.mean_over, groups=protocol.groups,
            )  # fmt: skip
            outcomes.append(outcome)
            if form is not None and not outcome.blind:
                write_submission(self.folder, form, self.rows, outcome)
        return write_evaluation(
            self.folder, description, self.rows, outcomes, num_cards=config.num_cards, against=against
        )

    def _check_shuffled(self) -> None:
        """Raises ValueError where frames are to be shuffled that cannot be, or are already."""
        given = self.data.renderer.shuffle_frames
        policy = self.config.policy
        if self.config.shuffled_baseline:
            replace(self.data.renderer, shuffle_frames=True)  # raises where frames are no video
        if given and self.config.shuffled_baseline:
            raise ValueError(
                "--shuffled_baseline=true asks with frames in order and shuffled, and --data.shuffle_frames=true shows "
                "none in order; set one of them"
            )
        if (given or self.config.shuffled_baseline) and not policy.shuffles_frames:
            raise ValueError(
                f"frames are shuffled as the features of a model in this process, and {type(policy).__name__} sends "
                "pixels; use longrl.evaluation.local_policy.LocalPolicy, or leave --shuffled_baseline and "
                "--data.shuffle_frames out"
            )
        if (given or self.config.shuffled_baseline) and policy.has_environment:
            raise ValueError(
                "frames are shuffled in prompts alone, and the tools of policy.init_args.environment would show parts "
                "of videos in order; set that to null, or leave --shuffled_baseline and --data.shuffle_frames out"
            )

    @property
    def rows(self) -> Sequence[Row]:
        """Rows of all questions."""
        return self.data.datasets["test"].rows

    def conditions(self) -> list[Condition]:
        """Conditions of the config: so many frames each, or `data.video` as it is; last, without media."""
        policy, sampling = self.config.policy, self.config.sampling
        plain = replace(
            self.data.renderer, blind_share=0.0, stored=policy.stored(), limits=policy.length_limits(sampling)
        )
        if plain.blind and self.config.frames:
            raise ValueError(f"--frames={self.config.frames} shows frames and data.blind none; set one of them")
        # Whatever the rule for frames is, a blind policy is shown none.
        blind = Condition(
            BLIND, replace(plain, blind=True, shuffle_frames=False, selection=None, video=type(plain.video)())
        )
        if plain.blind:
            return [blind]
        conditions = []
        for count in self.config.frames:
            # So many frames of every video, fewer only of one that has fewer: the data's limits give way.
            least = min(plain.video.min_frames, count)
            most = max(plain.video.max_frames, count)
            video = replace(plain.video, fps=None, num_frames=count, min_frames=least, max_frames=most)
            conditions.append(Condition(f"{count} frames", replace(plain, video=video), count))
        conditions = conditions or [Condition(WITH_VIDEO, plain)]
        if plain.shuffle_frames:
            conditions = [condition.shuffled for condition in conditions]
        if self.config.shuffled_baseline:
            conditions += [condition.shuffled for condition in conditions]
        return [*conditions, blind] if self.config.blind_baseline else conditions

    # -- asking --------------------------------------------------------------------------------------------------

    def _answers(self, condition: Condition, store: AnswerStore) -> tuple[dict[int, Answer], dict[int, UnusableSample]]:
        """The answers under a condition, and why questions have none, by the index of their row."""
        identity = {
            "policy": self.config.policy.identity(),
            "sampling": dataclasses.asdict(self.config.sampling),
            "seed": self.config.seed,
            "reading": make_portable(condition.renderer.identity()),
        }
        keys = [question_key(row, identity, condition.renderer) for row in self.rows]
        size = self.data.eval_prompts_per_batch
        local = (index for index in range(len(keys)) if index // size % self.num_parts == self.part)
        missing = [index for index in local if keys[index] not in store]
        skipped: dict[int, UnusableSample] = {}
        skips = self.data.skips("test")
        if not missing:
            return {index: store[key] for index, key in enumerate(keys) if key in store}, skipped
        num_answered = len(keys) - len(missing)
        if num_answered:
            logger.info("%s: %d of %d questions are answered already", condition.name, num_answered, len(keys))
        with item_progress() as progress:
            task = progress.add_task(condition.name, total=len(keys), completed=num_answered)

            def save(answers: Mapping[int, Answer | UnusableSample]) -> None:
                store.add({keys[index]: item for index, item in answers.items() if isinstance(item, Answer)})
                for index, item in answers.items():
                    if isinstance(item, UnusableSample):
                        skipped[index] = item
                        usable_items([item], skips)
                progress.advance(task, len(answers))

            def batches() -> Iterator[list[Item]]:
                """Prompts of the missing rows; a batch's rows are neighbours in the file, whatever is missing."""
                options = replace(self.data.loader_options, prefetch_prompts=size)
                items = options.render(RenderedRows(self.rows, condition.renderer), missing)
                for _, indices in itertools.groupby(missing, key=lambda index: index // size):
                    batch: list[Item] = []
                    for index in indices:
                        item = next(items)
                        if isinstance(item, UnusableSample):
                            skipped[index] = item
                            progress.advance(task)
                        # Raises where too many samples cannot be used.
                        batch += [(index, prompt) for prompt in usable_items([item], skips)]
                    if batch:
                        yield batch

            self.config.policy.answer(batches(), self.config.sampling, self.config.seed, save)
        return {index: store[key] for index, key in enumerate(keys) if key in store}, skipped
