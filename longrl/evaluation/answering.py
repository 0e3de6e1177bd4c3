"""Policies that answer an evaluation's questions, what an answer is, and where answers wait until all are there."""

from __future__ import annotations

import abc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch

from longrl.datamodules.loading.render import KnowsFeatures, RowRenderer
from longrl.datamodules.loading.shown_media import files_of
from longrl.datamodules.media.frame_lists import frame_files
from longrl.datamodules.media.subtitles import subtitle_files
from longrl.evaluation.costs import ModelCost, measured
from longrl.io.append_log import AppendLog
from longrl.models.base import CausalFamily
from longrl.models.reading import RendersPrompts
from longrl.packing.lengths import LengthLimit
from longrl.turns import saved_turn
from longrl.types import Completion, Media, Prompt, Row, SamplingParams, UnusableSample

Item = tuple[int, Prompt]
"""Index of a row and its prompt."""


@dataclass(frozen=True)
class Answer:
    """G answers of a policy to a question, and what it was shown."""

    texts: list[str]
    """[G]"""
    finish_reasons: list[str]
    """[G] `stop`, `length` for one that was cut off, or what a server calls it."""
    num_completion_tokens: list[int]
    """[G]"""
    num_prompt_tokens: int
    """Media included."""
    num_media_tokens: int | None
    """Tokens of images, videos and sounds among them; None where a server does not say."""
    input: str
    """The prompt without its media."""
    prompt_hash: str
    """Sha256 of all that the policy was shown: text and pixels."""
    frame_indices: list[list[int]]
    """Indices of the frames in the file, for each video or image."""
    frame_times: list[list[float]]
    """The same frames' times in seconds."""
    num_torn: int = 0
    """Videos whose files were cut off, and of which what is there was shown."""
    turns: list[list[dict[str, Any]]] = field(default_factory=list)
    """[G] turns of each answer, as `saved_turn` has them; [] without an environment."""
    video_s: list[float] = field(default_factory=list)
    """Seconds of each video; [] without one, and in answers of earlier releases."""
    costs: dict[str, float] = field(default_factory=dict)
    """Operations by the names of `longrl.evaluation.costs.OPERATIONS`; {} where they are not known."""
    measured: dict[str, float | None] = field(default_factory=dict)
    """By the names of `longrl.evaluation.costs.MEASURED`; {} in answers of earlier releases."""


SaveAnswers = Callable[[Mapping[int, Answer | UnusableSample]], None]
"""Takes answers by the index of their row, or what took their place; they are on disk when it returns."""


def make_answer(
    family: CausalFamily,
    prompt: Prompt,
    completions: Sequence[Completion],
    cost: ModelCost | None = None,
    encoded: Iterable[Media] | None = None,
) -> Answer:
    """The answer that the completions of a prompt are.

    Args:
        family: of the model that gave it.
        prompt: the question.
        completions: of the prompt.
        cost: of that model; None leaves operations out.
        encoded: media that this run sent through the encoder for the question; None where that is not known.
    """
    is_media = torch.isin(prompt.input_ids, torch.tensor(list(family.media_token_ids().values())))
    return Answer(
        texts=[completion.text for completion in completions],
        finish_reasons=[completion.finish_reason for completion in completions],
        num_completion_tokens=[completion.num_sampled for completion in completions],
        num_prompt_tokens=len(prompt.input_ids),
        num_media_tokens=int(is_media.sum()),
        input=family.tokenizer.decode(prompt.input_ids[~is_media]),
        prompt_hash=hash_json([prompt.input_ids.tolist(), [item.key for item in prompt.media]]),
        frame_indices=[list(indices) for indices in prompt.frame_indices],
        frame_times=[list(times) for times in prompt.frame_times],
        num_torn=len(prompt.torn_videos),
        turns=[[saved_turn(turn) for turn in each.turns] for each in completions if each.turns],
        video_s=list(prompt.video_s),
        costs=cost.of_answers(prompt, completions) if cost is not None else {},
        measured=measured(prompt, cost, encoded),
    )


class Policy(abc.ABC):
    """A model under evaluation: in this process, or behind an endpoint."""

    family: RendersPrompts
    """The family that reads rows for it."""
    samples_frames: bool = True
    """False where whole videos are handed over, of which somebody else samples frames."""
    shuffles_frames: bool = False
    """True if it reads features, whose rows can be those of shuffled frames."""
    has_environment: bool = False
    """True if an environment answers its turns, whose tools show parts of videos in order."""

    @abc.abstractmethod
    def prepare(self, folder: Path) -> None:
        """Loads weights or opens files below the evaluation's folder; called once, before all that follows."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Returns what decides answers beside question, prompt and sampling: model, weights, engine. JSON, no paths."""

    def stored(self) -> KnowsFeatures | None:
        """The store that knows which videos need not be decoded, once it is prepared; None: all must be."""
        return None

    def fit_lengths(self, max_prompt_tokens: int | None, sampling: SamplingParams) -> None:  # noqa: B027
        """Has its engine hold such prompts and completions, see `RolloutEngine.fit_lengths`; comes before `prepare`."""

    def length_limits(self, sampling: SamplingParams) -> tuple[LengthLimit, ...]:
        """What limits prompts that are answered so; longer ones are skipped. By default it is not known here."""
        return ()

    def close(self) -> None:  # noqa: B027  # by default there is nothing to do
        """The evaluation is over."""

    def check(self, sampling: SamplingParams) -> None:  # noqa: B027  # by default it knows all
        """Raises ValueError for a way of sampling that it does not know."""

    @abc.abstractmethod
    def answer(self, batches: Iterable[Sequence[Item]], sampling: SamplingParams, seed: int, save: SaveAnswers) -> None:
        """Answers prompts and hands them to `save` as they come, or what took their place.

        Args:
            batches: prompts of rows that follow each other. A batch has the same prompts in every run that finds none
                of its rows answered, so that what is computed together, and hence its rounding, does not depend on
                where an earlier run was killed.
            sampling: how.
            seed: of the sampling.
            save: takes the answers.
        """


def doc_hash(row: Row) -> str:
    """Sha256 of a row: question, answer, kind, metadata and the names of its media, not their folders."""
    content = {**asdict(row), "metadata": make_portable(row.metadata)}
    for kind in ("videos", "images", "audios"):
        content[kind] = [Path(path).name for path in content[kind]]
    if not row.messages:  # no conversation: the hash is that of releases before 0.2
        del content["messages"], content["response"]
    # What is taught beside a conversation's last turn decides no answer, nor does when a row was drawn.
    for name in ("trace", "rejected", "draw"):
        del content[name]
    return hash_json(content, default=repr)  # metadata may hold anything, such as dates


def hash_json(value: Any, default: Callable[[Any], str] | None = None) -> str:
    """Sha256 of a value as JSON; what JSON cannot hold is an error, or written by `default`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


def make_portable(value: Any) -> Any:
    """A value as JSON in which files and folders go by their names: on another machine they lie elsewhere."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(name): make_portable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [make_portable(item) for item in value]
    if isinstance(value, str) and os.sep in value and (os.path.isabs(value) or os.path.exists(value)):
        return Path(value).name
    return value


def question_key(row: Row, identity: Mapping[str, Any], renderer: RowRenderer) -> str:
    """Name of a question's answer on disk: hash of row, media, subtitles and `identity`.

    Of files their sizes count, not their content: to hash it, hours of video would be read to find an answer.

    Args:
        row: the question.
        identity: of policy, sampling, seed and renderer, in values that are the same in every process.
        renderer: says which of the row's files are shown.
    """
    paths = subtitle_files(row, renderer.subtitles.source)
    if renderer.blind:
        paths = paths if renderer.subtitles.when_blind == "keep" else []
    else:
        paths += [file for path in files_of(row) for file in frame_files(path)]
    sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in paths]
    return hash_json([doc_hash(row), sizes, identity])


class AnswerStore(dict[str, Answer]):
    """Answers on disk, under keys that name all that decided them. Killed at any moment it has all or none of a batch.

    Args:
        folder: of an append-only log; several processes may share it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._log = AppendLog(folder)
        for entry in self._log.read():
            for key, values in entry["answers"].items():
                # Two processes may have answered one question: the first answer stays.
                self.setdefault(key, Answer(**values))

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Writes answers, in one line; they are on disk when it returns."""
        if answers:
            self._log.append(None, {"answers": {key: asdict(answer) for key, answer in answers.items()}})
            self.update(answers)

    def close(self) -> None:
        """Closes this process's file."""
        self._log.close()
