"""`python -m longrl evaluate`: a policy's answers to a benchmark, scored and reported; may be killed at any time.

Answers go to an append-only log, under keys that name all that decided them. What is written at the end is a
function of that log and the questions, so a run that was killed and started again leaves the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrl.commands.main import COMMAND_USAGE
from longrl.evaluation.answering import Answer, AnswerStore, Item, Policy, doc_hash, question_key, reading
from longrl.evaluation.earlier import RESULTS, check_extends
from longrl.evaluation.records import check_breakdowns
from longrl.evaluation.samples import FILE, sample_lines
from longrl.io.atomic import atomic_write
from longrl.io.jsonl import write_jsonl
from longrl.rewards import RewardSum
from longrl.types import SamplingParams

if TYPE_CHECKING:
    from rich.progress import Progress

    from longrl.datamodules.loading.render import RowRenderer
    from longrl.datamodules.longvideo_reason import LongVideoReason
    from longrl.evaluation.comparison import Records
    from longrl.evaluation.outcomes import Outcome
    from longrl.types import Row, UnusableSample

logger = logging.getLogger(__name__)

DESCRIPTION = """Evaluates a policy on a benchmark; configs/eval/ has examples. The same command goes on where it was
killed: what was answered is not asked again."""
NOT_HERE = frozenset(
    ("family", "train", "val", "stage", "response_template", "answer_template", "blind_share", "prompts_per_batch",
     "max_train_rows", "seed", "prefetch_prompts")
)  # fmt: skip
"""Options of the data module that an evaluation has no use for."""
GREEDY = SamplingParams(num_generations=1, max_completion_tokens=1024, temperature=0.0)
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
    """Of the benchmark, for the report."""
    sampling: SamplingParams = GREEDY
    """Greedy by default; leave room for the reasoning, or `truncation_rate` says what was cut off."""
    seed: int = 0
    """Of the sampling."""
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


def main(args: Sequence[str]) -> None:
    """Command line of `evaluate`."""
    config, data = parsed(args)
    Evaluation(config, data).run()


def parsed(args: Sequence[str]) -> tuple[EvaluationConfig, LongVideoReason]:
    """What the command line describes; nothing is read or loaded yet."""
    from jsonargparse import ArgumentParser

    from longrl.commands.run_config import evaluation_config, set_config_reader
    from longrl.datamodules.longvideo_reason import LongVideoReason

    set_config_reader(evaluation_config)
    usage = COMMAND_USAGE.format("python -m longrl", "evaluate")
    parser = ArgumentParser(prog="python -m longrl evaluate", usage=usage, description=DESCRIPTION)
    parser.add_argument("--config", action="config", help="a YAML file; later ones win, key by key")
    parser.add_class_arguments(EvaluationConfig, sub_configs=True)
    parser.add_class_arguments(LongVideoReason, "data", skip=set(NOT_HERE), instantiate=False, sub_configs=True)
    values = parser.instantiate(parser.parse_args(list(args)))
    options = {item.name: values[item.name] for item in dataclasses.fields(EvaluationConfig)}
    config = EvaluationConfig(**options)
    return config, LongVideoReason(config.policy.family, **vars(values.data))


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
        self.store: AnswerStore | None = None
        self.part, self.num_parts = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def run(self) -> dict[str, Any]:
        """Everything.

        Returns:
            What is in results.json.

        Raises:
            ValueError: results of another evaluation in `out`, no questions, too many that cannot be asked
                (`data.max_skipped_share`), an endpoint that refuses every call or a spent budget. What was answered
                until then is on disk.
        """
        self.config.policy.check(self.config.sampling)
        if self.config.reward is not None:
            self.config.reward.prepare()
        before = self._read_against()  # an error is told before hours of work
        self._read_rows()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config.policy.prepare(self.folder)
        self.store = AnswerStore(self.folder / "answers")
        try:
            check_extends(self.folder, self._described())
            asked = [(condition, *self._asked(condition)) for condition in self.conditions()]
        finally:
            self.store.close()
            self.config.policy.close()
        if self.num_parts > 1:
            logger.warning(
                "part %d of %d is answered; run the command alone for the results", self.part, self.num_parts
            )
            return {}
        return self._write(asked, before)

    def _read_against(self) -> dict[str, Records] | None:
        """The run to compare with, if there is one."""
        from longrl.evaluation.comparison import read_run

        against = self.config.against
        if against is None:
            return None
        if Path(against).expanduser().resolve() == self.folder.resolve():
            raise ValueError(
                f"--against={against} is the folder of --out, and a run is not compared with itself; give another --out"
            )
        return read_run(against)

    def _read_rows(self) -> None:
        if not self.data.sources["test"]:
            raise ValueError("`evaluate` reads data.test, which is not set; give it a file or a hub id")
        self.data.skipped_dir = self.data.skipped_dir or str(self.folder)
        self.data.read(("test",))
        check_breakdowns(self.rows, self.config.breakdowns)

    @property
    def rows(self) -> Sequence[Row]:
        """All questions."""
        return self.data.datasets["test"].rows

    def conditions(self) -> list[Condition]:
        """With so many frames each, or as `data.video` says; and without media if that is asked for."""
        plain = replace(self.data.renderer, blind_share=0.0, stored=self.config.policy.stored())
        if plain.blind and self.config.frames:
            raise ValueError(f"--frames={self.config.frames} shows frames and data.blind none; set one of them")
        asked = [Condition(f"{count} frames", _with_frames(plain, count), count) for count in self.config.frames]
        if not asked:
            asked = [_blind(plain) if plain.blind else Condition("video", plain)]
        if self.config.blind_baseline and not plain.blind:
            asked.append(_blind(plain))
        return asked

    # -- asking --------------------------------------------------------------------------------------------------

    def _asked(self, condition: Condition) -> tuple[dict[int, Answer], dict[int, UnusableSample]]:
        """The answers under a condition, and why questions have none, by the number of their row."""
        assert self.store is not None
        keys = self._keys(condition)
        size = self.data.eval_prompts_per_batch
        own = (index for index in range(len(keys)) if index // size % self.num_parts == self.part)
        missing = [index for index in own if keys[index] not in self.store]
        skipped: dict[int, UnusableSample] = {}
        if missing:
            logger.info(
                "%s: %d of %d questions are answered already", condition.name, len(keys) - len(missing), len(keys)
            )
            self._ask(condition, keys, missing, skipped)
        return {index: self.store[key] for index, key in enumerate(keys) if key in self.store}, skipped

    def _keys(self, condition: Condition) -> list[str]:
        asked = {
            "policy": self.config.policy.identity(),
            "sampling": dataclasses.asdict(self.config.sampling),
            "seed": self.config.seed,
            "reading": reading(condition.renderer),
        }
        return [question_key(row, asked, condition.renderer) for row in self.rows]

    def _ask(
        self, condition: Condition, keys: Sequence[str], missing: Sequence[int], skipped: dict[int, UnusableSample]
    ) -> None:
        from longrl.types import UnusableSample

        assert self.store is not None
        store, skips = self.store, self.data.skips("test")
        with _progress() as progress:
            task = progress.add_task(condition.name, total=len(keys), completed=len(keys) - len(missing))

            def record(found: Mapping[int, Answer | UnusableSample]) -> None:
                store.add({keys[index]: item for index, item in found.items() if isinstance(item, Answer)})
                progress.advance(task, len(found))
                for index, item in found.items():
                    if isinstance(item, UnusableSample):
                        skipped[index] = item
                        skips.usable([item])

            def drop(item: UnusableSample) -> None:
                skipped[item.index] = item
                progress.advance(task)

            batches = self._batches(condition, missing, drop)
            self.config.policy.answer(batches, self.config.sampling, self.config.seed, record)

    def _batches(self, condition: Condition, missing: Sequence[int], drop: Any) -> Iterator[list[Item]]:
        """Prompts of the missing rows; a batch's rows are neighbours in the file, whatever is missing."""
        from longrl.datamodules.loading.loader import RenderedRows
        from longrl.types import UnusableSample

        size, skips = self.data.eval_prompts_per_batch, self.data.skips("test")
        options = replace(self.data.loader_options, prefetch_prompts=size)
        items = options.render(RenderedRows(self.rows, condition.renderer), missing)
        batch: list[Item] = []
        for place, index in enumerate(missing):
            item = next(items)
            if isinstance(item, UnusableSample):
                drop(item)
            batch += [(index, prompt) for prompt in skips.usable([item])]
            last = place + 1 == len(missing) or missing[place + 1] // size != index // size
            if batch and last:
                yield batch
                batch = []

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(
        self,
        asked: Sequence[tuple[Condition, dict[int, Answer], dict[int, UnusableSample]]],
        before: dict[str, Records] | None,
    ) -> dict[str, Any]:
        from longrl.evaluation.benchmark_report import show, write_benchmark_report
        from longrl.evaluation.comparison import compare_runs, read_run

        outcomes = [self._outcome(condition, answers, skipped) for condition, answers, skipped in asked]
        hashes, about = [doc_hash(row) for row in self.rows], self._about()
        lines = [
            line
            for found, (_, answers, _) in zip(outcomes, asked, strict=True)
            for line in sample_lines(found, self.rows, hashes, answers, about)
        ]
        write_jsonl(self.folder / FILE, lines)
        results = self._results(outcomes)
        write_json(self.folder / RESULTS, results)
        compared = None
        if self.config.against is not None and before is not None:
            compared = compare_runs(self.config.against, before, self.folder, read_run(self.folder))
            write_json(self.folder / "comparison.json", compared.to_dict())
        path = write_benchmark_report(self.folder, self.config, results, outcomes, self.rows, compared)
        show(self.config.name, outcomes, results, compared, path)
        return results

    def _outcome(
        self, condition: Condition, answers: Mapping[int, Answer], skipped: Mapping[int, UnusableSample]
    ) -> Outcome:
        from longrl.evaluation.outcomes import outcome

        return outcome(
            condition.name,
            self.rows,
            answers,
            skipped,
            breakdowns=self.config.breakdowns,
            reward=self.config.reward,
            num_frames=condition.num_frames,
            blind=condition.renderer.blind,
        )

    def _about(self) -> dict[str, Any]:
        """What is the same in all sample lines."""
        identity = self.config.policy.identity()
        return {
            "model": identity["model"],
            "model_revision": identity["revision"],
            "weights": identity.get("weights"),
            "engine": identity["engine"],
            "sampling": dataclasses.asdict(self.config.sampling),
            "seed": self.config.seed,
            "decode_backend": reading(self.data.renderer)["decoder"],
        }

    def _results(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """All numbers, without a path or a time: two runs that agree in them agree in every byte."""
        from longrl.evaluation.outcomes import gain_over

        blind = next((found for found in outcomes if found.blind), None)
        described = self._described()
        for found in outcomes:
            gain = gain_over(blind, found) if blind is not None and not found.blind else None
            over_blind = dataclasses.asdict(gain) if gain else None
            described["conditions"][found.name] |= {**found.to_dict(), "over_blind": over_blind}
        return described

    def _described(self) -> dict[str, Any]:
        """What is known before a question is asked: who answers what, and how; the skeleton of results.json."""
        return {
            "benchmark": self.config.name,
            "policy": self.config.policy.identity(),
            "sampling": dataclasses.asdict(self.config.sampling),
            "seed": self.config.seed,
            "questions": {
                "records": self.data.skips("test").num_rows,
                "malformed": self.data.skips("test").num_rows - len(self.rows),
                "asked": len(self.rows),
                "fingerprint": self.data.datasets["test"].fingerprint,
            },
            "conditions": {item.name: {"reading": reading(item.renderer)} for item in self.conditions()},
        }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; readers see the old file or the whole new one."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _blind(renderer: RowRenderer) -> Condition:
    """Whatever the rule for frames is: nothing is shown."""
    from longrl.datamodules.media.sampling import VideoSampling

    return Condition(BLIND, replace(renderer, blind=True, video=VideoSampling()))


def _with_frames(renderer: RowRenderer, count: int) -> RowRenderer:
    """The renderer that shows so many frames of every video, fewer only of one that has fewer."""
    video = renderer.video
    fewest, most = min(video.min_frames, count), max(video.max_frames, count)
    return replace(renderer, video=replace(video, fps=None, num_frames=count, min_frames=fewest, max_frames=most))


def _progress() -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
