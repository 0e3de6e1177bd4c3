"""Questions that another harness asks, answered by the policies of `python -m longrl evaluate`.

A harness brings questions, wording and scoring; who answers, which frames are shown and how answers are sampled is
longrl's. Its options are those of `evaluate`, and answers are kept in its folder, so that what was answered once is not
asked again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from longrl.commands.evaluate import parse_evaluation
from longrl.commands.shipped_paths import with_shipped_files
from longrl.datamodules.loading.loader import RenderedRows
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.rows.conversations import read_conversation
from longrl.evaluation.answering import Answer, AnswerStore, Item, make_portable, question_key
from longrl.evaluation.benchmark import EvaluationConfig
from longrl.io.progress import item_progress
from longrl.rewards.answers import answer_text, lenient_text
from longrl.types import Row, SamplingParams, UnusableSample

logger = logging.getLogger(__name__)

Wording = Literal["task", "own"]
HandsOver = Literal["text", "answer"]
AS_ASKED = "{problem}"
"""Template of a question that is shown as its harness words it."""
CHOICES = {"wording": ("task", "own"), "sampling": ("task", "own"), "hands_over": ("text", "answer")}
DEFAULT_ARGUMENTS = (
    "--policy.class_path=longrl.evaluation.local_policy.LocalPolicy", "--out=runs/harness",
    # Files lie where the harness has put them.
    "--data.allow_outside_paths=true",
)  # fmt: skip


class HarnessAnswerer:
    """A policy of an evaluation that answers whatever rows it is given.

    Args:
        config: of the evaluation; its `sampling` is used where the harness has none, its `out` keeps the answers.
        data: says how rows are shown; none of its sources is read.
        wording: `task` shows questions as the harness words them, media where it places them; `own` puts its text into
            `data.question_template`, behind the media: for policies that were trained with a template.
        sampling: `task` samples as the harness's task says, `own` as the config does: for policies that reason.
        hands_over: the whole `text`, or the `answer` alone: what stands in the tag, else what follows the thinking.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        data: LongVideoReason,
        *,
        wording: Wording = "task",
        sampling: Literal["task", "own"] = "task",
        hands_over: HandsOver = "text",
    ) -> None:
        for name, value in (("wording", wording), ("sampling", sampling), ("hands_over", hands_over)):
            if value not in CHOICES[name]:
                raise ValueError(f"{name} must be {' or '.join(CHOICES[name])}, got {value!r}")
        self.config, self.data = config, data
        self.wording, self.sampling, self.hands_over = wording, sampling, hands_over
        self.own_sampling = replace(config.sampling, num_generations=1)
        self.folder = Path(config.out).expanduser()
        self._store: AnswerStore | None = None

    @classmethod
    def from_options(
        cls, config: str | None = None, weights: str | None = None, *, wording: Wording = "task",
        sampling: Literal["task", "own"] = "task", hands_over: HandsOver = "text", **options: Any,
    ) -> HarnessAnswerer:  # fmt: skip
        """The answerer of a command line of `evaluate`; nothing is loaded yet.

        Args:
            config: a YAML file of `evaluate`, as those of configs/eval/.
            weights: a run's folder, a checkpoint, an exported folder or a hub id.
            wording: see the class.
            sampling: see the class.
            hands_over: see the class.
            options: further options of `evaluate` by their names, as `{"data.video.num_frames": 64}`.
        """
        given = {} if config is None else {"config": config}
        given |= {} if weights is None else {"policy.init_args.weights": weights}
        args = [*DEFAULT_ARGUMENTS, *(f"--{name}={_as_argument(value)}" for name, value in (given | options).items())]
        parsed = parse_evaluation(with_shipped_files(["evaluate", *args])[1:])
        return cls(*parsed, wording=wording, sampling=sampling, hands_over=hands_over)

    def row(
        self, name: str, messages: Sequence[Mapping[str, Any]], span_s: Sequence[float] | None = None
    ) -> Row | UnusableSample:
        """A question as a row, or why it cannot be asked.

        Args:
            name: of the question, another one for each.
            messages: as of a record with `messages`; media are paths or pictures.
            span_s: the part of its videos that is shown, in seconds.

        Raises:
            ValueError: several turns with `wording: own`.
        """
        media_folder = self.folder / "media"  # where pictures in memory are written
        media_folder.mkdir(parents=True, exist_ok=True)
        try:
            spoken = read_conversation({"messages": messages}, str(media_folder))
        except ValueError as error:
            return UnusableSample(None, str(error), row_id=name)
        metadata = {} if span_s is None else {"span_s": tuple(span_s)}
        row = Row(
            name, spoken.question, "", "free_form", metadata=metadata, videos=spoken.media.get("videos", ()),
            images=spoken.media.get("images", ()), audios=spoken.media.get("audios", ()),
        )  # fmt: skip
        if self.wording == "task":
            return replace(row, messages=spoken.messages)
        asked = [message["role"] for message in spoken.messages]
        if asked.count("user") != 1 or "assistant" in asked:
            raise ValueError(f"{name}: wording=own is for one question, got turns of {asked}; set wording to task")
        return row

    def answer(
        self, rows: Sequence[Row | UnusableSample], sampling: SamplingParams | None = None,
        video: VideoSampling | None = None, draw: int = 0,
    ) -> list[Answer | UnusableSample]:  # fmt: skip
        """Answers rows that are not answered yet, and returns the answers to all, in their order.

        Args:
            rows: from `row`.
            sampling: how; by default, and with `sampling: own`, as the config says.
            video: which frames; by default `data.video`.
            draw: number of the draw, where a question is asked several times.
        """
        sampling = self.own_sampling if sampling is None or self.sampling == "own" else sampling
        readable = [row for row in rows if isinstance(row, Row)]
        answers = iter(self._answer(readable, sampling, video or self.data.renderer.video, self.config.seed + draw))
        results = [next(answers) if isinstance(row, Row) else row for row in rows]
        self._list_unusable(rows, results)
        return results

    def _answer(
        self, rows: Sequence[Row], sampling: SamplingParams, video: VideoSampling, seed: int
    ) -> list[Answer | UnusableSample]:
        policy = self.config.policy
        store = self._prepared(rows, sampling)
        renderer = replace(self._asked, video=video, stored=policy.stored(), limits=policy.length_limits(sampling))
        identity = {
            "policy": policy.identity(), "sampling": dataclasses.asdict(sampling), "seed": seed,
            "reading": make_portable(renderer.identity()),
        }  # fmt: skip
        keys = [question_key(row, identity, renderer) for row in rows]
        missing = [index for index, key in enumerate(keys) if key not in store]
        failed: dict[int, UnusableSample] = {}
        with item_progress() as progress:
            task = progress.add_task("longrl", total=len(rows), completed=len(rows) - len(missing))

            def save(answers: Mapping[int, Answer | UnusableSample]) -> None:
                store.add({keys[index]: item for index, item in answers.items() if isinstance(item, Answer)})
                failed.update({index: item for index, item in answers.items() if isinstance(item, UnusableSample)})
                progress.advance(task, len(answers))

            def batches() -> Iterator[list[Item]]:
                size = self.data.eval_prompts_per_batch
                options = replace(self.data.loader_options, prefetch_prompts=size)
                batch: list[Item] = []
                for index, item in zip(missing, options.render(RenderedRows(rows, renderer), missing), strict=True):
                    if isinstance(item, UnusableSample):
                        save({index: item})
                        continue
                    batch.append((index, item))
                    if len(batch) == size:
                        yield batch
                        batch = []
                if batch:
                    yield batch

            if missing:
                policy.answer(batches(), sampling, seed, save)
        return [failed[index] if index in failed else store[key] for index, key in enumerate(keys)]

    def text(self, answer: Answer | UnusableSample) -> str:
        """What the harness is told; "" of a question that could not be asked, which it will count as wrong."""
        if isinstance(answer, UnusableSample):
            return ""
        said = answer.texts[0]
        return said if self.hands_over == "text" else answer_text(said) or lenient_text(said).strip()

    def close(self) -> None:
        """No further question will come."""
        if self._store is not None:
            self._store.close()
            self._store = None
            self.config.policy.close()

    @property
    def _asked(self) -> RowRenderer:
        """What shows questions, before the policy is there."""
        template = self.data.renderer.question_template if self.wording == "own" else AS_ASKED
        return replace(self.data.renderer, question_template=template, blind_share=0.0)

    def _prepared(self, rows: Sequence[Row], sampling: SamplingParams) -> AnswerStore:
        """Loads the policy when the first questions come, once all that can be tried without it was tried."""
        policy = self.config.policy
        policy.check(sampling)
        if self._store is None:
            self._asked.try_options(rows)
            longest = max(sampling.max_completion_tokens, self.own_sampling.max_completion_tokens)
            engine_sampling = replace(sampling, max_completion_tokens=longest)
            policy.fit_lengths(self.data.renderer.max_prompt_tokens, engine_sampling)
            self.folder.mkdir(parents=True, exist_ok=True)
            policy.prepare(self.folder)
            self._store = AnswerStore(self.folder / "answers")
        return self._store

    def _list_unusable(self, rows: Sequence[Row | UnusableSample], results: Sequence[Answer | UnusableSample]) -> None:
        """Warns of questions that could not be asked, and lists them in skipped.jsonl."""
        lines = []
        for row, result in zip(rows, results, strict=True):
            if isinstance(result, UnusableSample):
                name = row.id if isinstance(row, Row) else row.row_id
                lines.append({"split": "harness", "id": name, "path": result.path, "reason": result.reason})
        if not lines:
            return
        file = self.folder / "skipped.jsonl"
        with file.open("a", encoding="utf-8") as appended:
            appended.writelines(json.dumps(line) + "\n" for line in lines)
        logger.warning(
            "%d of %d questions could not be asked and get an empty answer, the first %s: %s; %s lists them",
            len(lines), len(rows), lines[0]["id"], lines[0]["reason"], file,
        )  # fmt: skip


def _as_argument(value: Any) -> str:
    """A value as the command line of `evaluate` has it."""
    return value if isinstance(value, str) else json.dumps(value)


def sampling_of(generation: Mapping[str, Any], default: SamplingParams) -> SamplingParams:
    """How a harness wants answers sampled, in transformers' words.

    Args:
        generation: `max_new_tokens`, `temperature`, `top_p`, `top_k` and `do_sample`; others have no effect, of which
            beams are told.
        default: what it does not say.
    """
    if (generation.get("num_beams") or 1) > 1:
        logger.warning(
            "num_beams=%s has no effect: answers are drawn one token after the other", generation["num_beams"]
        )
    temperature = generation.get("temperature")
    if generation.get("do_sample") is False:
        temperature = 0.0
    names = {"max_new_tokens": "max_completion_tokens", "top_p": "top_p", "top_k": "top_k"}
    given = {own: generation[name] for name, own in names.items() if generation.get(name) is not None}
    if temperature == 0 and given.get("top_p") == 0:  # as some greedy tasks say it, where it means nothing
        del given["top_p"]
    if temperature is not None:
        given["temperature"] = float(temperature)
    return replace(default, **given)


def asked_frames(video: VideoSampling, num_frames: int | None, fps: float | None) -> VideoSampling:
    """The sampling with a harness's own number of frames, to which the data's limits give way, or its rate."""
    if num_frames:
        least, most = min(video.min_frames, num_frames), max(video.max_frames, num_frames)
        return replace(video, fps=None, num_frames=num_frames, min_frames=least, max_frames=most)
    return replace(video, fps=fps, num_frames=None) if fps else video


def launched_ranks() -> tuple[int, int]:
    """Rank and number of the processes that share the questions, as launchers say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
