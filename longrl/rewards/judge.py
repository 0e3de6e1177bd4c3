"""Open-ended answers: judged by a model behind an OpenAI-compatible endpoint, or by the words they share.

`Judge` and `TextSimilarity` take the place of `longrl.rewards.accuracy` for data with open-ended questions, Video-R1's
free-form ones included; rows of other tasks keep their rule. A judgement that fails makes its completion invalid (it
is left out of the loss); it is never a 0. Nothing falls back to the text similarity by itself: it is chosen, as the
class of the reward.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import ClassVar

from longrl.chat.client import ChatClient, replies_in
from longrl.chat.endpoint import Budget, Decoding, Endpoint, Reply, Request
from longrl.chat.event_loop import run_async
from longrl.io.number_ranges import COUNT, SECONDS, check_ranges
from longrl.rewards.answers import after_thinking, strict_text
from longrl.rewards.batch import BatchReward
from longrl.rewards.exact import normalized_text
from longrl.rewards.failures import log_none_judged
from longrl.rewards.reward_sum import OPEN_TASKS, RULE_TASKS, accuracy
from longrl.types import Completion, Row

PROMPT = files(__package__).joinpath("judge_prompt.txt").read_text()
SCORE = re.compile(r"SCORE\W{0,4}([01](?:\.\d+)?)(?![\d.]*\d)", re.IGNORECASE)
SCORE_FORM = 'a last line "SCORE: x", with x from 0 (wrong) to 1 (right)'
"""What a judge's reply must end with."""
TAGS = re.compile(r"</?\s*(?:question|reference_answer|answer_to_grade)\s*>", re.IGNORECASE)


class JudgementFailed(ValueError):
    """A judge's reply without a score."""


def judge_request(
    model: str, question: str, reference: str, answer: str, decoding: Decoding, prompt: str = PROMPT
) -> Request:
    """The request to a judge; nothing in the answer can close its tag."""
    parts = {"question": question, "reference": reference, "answer": answer}
    parts = {name: TAGS.sub(" ", text).strip() for name, text in parts.items()}
    # One pass, so that braces and "{answer}" in a text stay what they are.
    text = re.sub(r"\{(question|reference|answer)\}", lambda match: parts[match[1]], prompt)
    return Request(model, ({"role": "user", "content": text},), decoding)


def judge_score(reply: Reply) -> float:
    """The score in a judge's reply, in [0, 1]: the last one it states after its thinking.

    Raises:
        JudgementFailed: a refusal, or no score.
    """
    if reply.refusal is not None or reply.finish_reason == "content_filter":
        raise JudgementFailed(f"the judge refused: {reply.refusal or reply.text[:200]!r}")
    scores = SCORE.findall(after_thinking(reply.text))
    if not scores or float(scores[-1]) > 1.0:
        raise JudgementFailed(f"the judge's reply has no score; wanted is {SCORE_FORM}, got {reply.text[-200:]!r}")
    return float(scores[-1])


@dataclass(frozen=True)
class Judge(BatchReward[Completion]):
    """How right the answer is, in [0, 1]: open-ended ones as a model judges them, others as `accuracy` does.

    The model sees question, reference answer and the content of `<answer>`; a completion without one scores 0 unasked.
    Each distinct answer of a step is one call, and all calls of a step are under way together. Replies are kept in
    `cache_dir` and never asked for twice. A judge on this machine is the same with the url of a vLLM server.

    Example:
        ```yaml
        - function:
            class_path: longrl.rewards.judge.Judge
            init_args: {endpoint: {model: Qwen/Qwen3-8B, url: "http://127.0.0.1:8000/v1"}, cache_dir: runs/judge}
          name: accuracy
        ```
    """

    tasks: ClassVar[frozenset[str]] = RULE_TASKS.union(OPEN_TASKS)
    endpoint: Endpoint
    cache_dir: str
    """Folder of all replies; ranks and runs may share it."""
    decoding: Decoding = field(default_factory=lambda: Decoding(temperature=0.0, max_tokens=512))
    budget: Budget = field(default_factory=Budget)
    """Over all calls recorded in `cache_dir`; beyond it judgements fail."""
    prompt: str = PROMPT
    """With `{question}`, `{reference}` and `{answer}`; the reply must end with "SCORE: x"."""
    attempts: int = 3
    """Times a judge is asked about an answer, beside the replies in `cache_dir`, until one has a score."""
    time_limit_s: float = 1200.0
    """For all judgements of a step together, with what is tried again; those that are not there by then fail."""

    def __post_init__(self) -> None:
        missing = [name for name in ("{question}", "{reference}", "{answer}") if name not in self.prompt]
        if missing:
            raise ValueError(f"the prompt of a judge must contain {', '.join(missing)}, got {self.prompt[:200]!r}")
        check_ranges(self, "the judge's ", attempts=COUNT, time_limit_s=SECONDS)

    def score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[float | Exception]:
        """Values of any number of completions, judged at once."""
        return run_async(lambda: self._score_all(completions, rows))

    async def _score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[float | Exception]:
        async with ChatClient(self.endpoint, replies_in(self.cache_dir, self.budget)) as client:
            results = await asyncio.gather(
                *(self._score_in_time(client, *pair) for pair in zip(completions, rows, strict=True)),
                return_exceptions=True,
            )
        values = []
        for value in results:
            if isinstance(value, BaseException) and not isinstance(value, Exception):
                raise value
            values.append(value)
        log_none_judged(values, f"{self.endpoint.model} at {self.endpoint.url}")
        return values

    async def _score_in_time(self, client: ChatClient, completion: Completion, row: Row) -> float:
        try:
            async with asyncio.timeout(self.time_limit_s):
                return await self._score(client, completion, row)
        except TimeoutError as error:
            raise JudgementFailed(
                f"the judge has not answered within its time_limit_s={self.time_limit_s:g}"
            ) from error

    async def _score(self, client: ChatClient, completion: Completion, row: Row) -> float:
        if not self.judges(row):
            return accuracy(completion, row)
        answer = self.answer_in(completion)
        if not answer:
            return 0.0
        request = self.request(row, answer)
        failure = JudgementFailed("the judge was not asked")
        for attempt in client.attempts(lambda sample: replace(request, sample=sample), self.reply_form, self.attempts):
            try:
                return self.value_of(await client.ask(attempt))
            except JudgementFailed as error:
                failure = error
        raise failure

    # -- what another form of judge does differently -------------------------------------------------------------

    @property
    def reply_form(self) -> str:
        """What a reply must end with."""
        return SCORE_FORM

    def judges(self, row: Row) -> bool:
        """True for a row whose answers the model is asked about."""
        return row.task in OPEN_TASKS

    def answer_in(self, completion: Completion) -> str:
        """What the model is shown of a completion; "" scores 0 unasked."""
        return strict_text(completion.text)

    def request(self, row: Row, answer: str) -> Request:
        """The request about an answer."""
        return judge_request(self.endpoint.model, row.problem, row.answer, answer, self.decoding, self.prompt)

    def value_of(self, reply: Reply) -> float:
        """The value that a reply says; raises JudgementFailed where it says none."""
        return judge_score(reply)


@dataclass(frozen=True)
class TextSimilarity:
    """F1 of the words that answer and reference share (as SQuAD scores), in [0, 1]; other tasks as `accuracy` does.

    No model is asked, and no meaning understood: "not a cat" is close to "a cat". Scripts without spaces are compared
    by characters.
    """

    tasks: ClassVar[frozenset[str]] = RULE_TASKS.union(OPEN_TASKS)

    def __call__(self, completion: Completion, row: Row) -> float:
        """The value of one completion."""
        if row.task not in OPEN_TASKS:
            return accuracy(completion, row)
        return shared_words(strict_text(completion.text), row.answer)


def shared_words(first: str, second: str) -> float:
    """F1 of two texts' words, counted with repeats; 0.0 where one is empty."""
    one, other = Counter(_units(first)), Counter(_units(second))
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def _units(text: str) -> list[str]:
    """Words, or single characters of scripts that put no spaces between words (CJK, Thai, ...)."""
    unspaced = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
    return re.findall(rf"{unspaced}|[^\W_]+", normalized_text(text))
