"""Rewards of a scorer behind HTTP: a service of one's own that takes batches, or a reward model that vLLM serves.

Calls have the limits of a judge's: so many at once, repeated where that helps, within a budget, and each answer kept.
A score that fails makes its completion invalid (it is left out of the loss); it is never a 0.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from longrl.chat.client import ChatClient, replies_in
from longrl.chat.endpoint import Budget, Endpoint, ImageLoader
from longrl.chat.event_loop import run_async
from longrl.io.jsonl import parse_json
from longrl.io.number_ranges import COUNT, SECONDS, check_ranges
from longrl.io.secrets import mask_secrets
from longrl.rewards.batch import BatchReward
from longrl.rewards.failures import log_none_judged
from longrl.rewards.reward_model import message_text
from longrl.types import Completion, Row

Item = Mapping[str, Any]
"""A completion and its row, as a scorer gets them: `scored_item`."""
Value = float | Exception | None


class ScoreFailed(ValueError):
    """A completion that a scorer gave no score."""


@dataclass(frozen=True)
class Scores:
    """A scorer's answer."""

    values: tuple[Value, ...]
    """One of each item: a number, None where the reward does not apply, or why there is none."""
    prompt_tokens: int = 0
    """As the server counts them, 0 if it does not."""
    completion_tokens: int = 0


@dataclass(frozen=True)
class ScoreRequest:
    """A batch of items: `{"model", "items": [..]}` -> `{"scores": [..]}`, in their order.

    A score is a number, null where the reward does not apply, or `{"error": text}`.
    """

    model: str
    items: tuple[Item, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    path: ClassVar[str] = ""
    num_images: ClassVar[int] = 0
    load: ClassVar[ImageLoader | None] = None

    @property
    def key(self) -> str:
        """Hash of all that decides the scores."""
        parts = [type(self).__name__, self.model, list(self.items), dict(self.extra)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def body(self, images: Mapping[str, str], send_seed: bool) -> dict[str, Any]:
        """The JSON that is sent."""
        return {"model": self.model, "items": list(self.items), **self.extra}

    def recorded(self) -> dict[str, Any]:
        """What the log of replies keeps of it."""
        return {"items": list(self.items)}

    def read(self, content: bytes) -> tuple[Any, Scores]:
        """The JSON of a server's answer, and the scores in it.

        Raises:
            ValueError: it has not one score of each item.
        """
        answer = mask_secrets(parse_json(content))
        return answer, self._scores(answer)

    def read_again(self, entry: Mapping[str, Any]) -> Scores:
        """The scores in an entry of the log."""
        return self._scores(entry["response"])

    def _scores(self, answer: Any) -> Scores:
        found = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(self.items):
            raise ValueError(f'a scorer must answer {{"scores": [..]}} with {len(self.items)} scores')
        return Scores(tuple(map(_value, found)), **_usage(answer))


@dataclass(frozen=True)
class VLLMScoreRequest(ScoreRequest):
    """One item by vLLM's `/pooling`, which writes the chat and reads the reward model's head, without a sigmoid."""

    path: ClassVar[str] = "/pooling"

    def body(self, images: Mapping[str, str], send_seed: bool) -> dict[str, Any]:
        """The JSON that is sent."""
        (item,) = self.items
        asked = item.get("messages") or [{"role": "user", "content": item["prompt"]}]
        texts = [{"role": message["role"], "content": message_text(message["content"])} for message in asked]
        messages = [*texts, {"role": "assistant", "content": item["completion"]}]
        chat = {"add_generation_prompt": False, "use_activation": False}
        return {"model": self.model, "messages": messages, **chat, **self.extra}

    def _scores(self, answer: Any) -> Scores:
        try:
            (data,) = answer["data"]
            (value,) = data["data"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError("vLLM's /pooling must answer one number: serve a reward model of one label") from error
        return Scores((_value(value),), **_usage(answer))


@dataclass(frozen=True)
class RemoteScorer(BatchReward[Completion]):
    """The score that a service gives a completion; of a service of one's own see `ScoreRequest` for what it answers.

    Each distinct completion of a step is sent once, in batches, all of which are under way together within the
    endpoint's limits. Answers are kept in `cache_dir`, and the same batch is not sent twice.

    Example:
        ```yaml
        - function:
            class_path: longrl.rewards.remote.RemoteScorer
            init_args: {endpoint: {model: my-scorer-v1, url: "http://10.0.0.5:9000/score"}, cache_dir: runs/scores}
        ```
    """

    endpoint: Endpoint
    """Its url is where batches are posted; of `form: vllm` the server's, without `/v1`. Its model is part of what is
    kept in `cache_dir`: another name asks again."""
    cache_dir: str
    """Folder of all answers; ranks and runs may share it."""
    form: Literal["batch", "vllm"] = "batch"
    """`batch` is a service of one's own; `vllm` a reward model behind `vllm serve --runner pooling`."""
    batch_size: int = 16
    """Completions of a call; with `form: vllm` each is one."""
    budget: Budget = field(default_factory=Budget)
    """Over all calls recorded in `cache_dir`; beyond it scores fail."""
    time_limit_s: float = 1200.0
    """For all scores of a step together, with what is tried again; those that are not there by then fail."""

    def __post_init__(self) -> None:
        check_ranges(self, "RemoteScorer: ", batch_size=COUNT, time_limit_s=SECONDS)

    def score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[Value]:
        """Values of any number of completions, asked for at once."""
        return run_async(lambda: self._score_all(completions, rows))

    async def _score_all(self, completions: Sequence[Completion], rows: Sequence[Row]) -> list[Value]:
        # 1. Distinct items in their order, in batches.
        items = [scored_item(*pair) for pair in zip(completions, rows, strict=True)]
        keys = [json.dumps(item, sort_keys=True) for item in items]
        by_key = dict(zip(keys, items, strict=True))
        distinct = list(by_key)
        size = 1 if self.form == "vllm" else self.batch_size
        batches = [distinct[start : start + size] for start in range(0, len(distinct), size)]

        # 2. One call of each batch.
        async with ChatClient(self.endpoint, replies_in(self.cache_dir, self.budget)) as client:
            requests = [self._request([by_key[key] for key in batch]) for batch in batches]
            scores = await asyncio.gather(*(self._ask(client, request) for request in requests))

        # 3. A value of each completion.
        found: dict[str, Value] = {}
        for batch, values in zip(batches, scores, strict=True):
            found |= zip(batch, values, strict=True)
        values = [found[key] for key in keys]
        log_none_judged(values, f"{self.endpoint.model} at {self.endpoint.url}")
        return values

    def _request(self, items: Sequence[Item]) -> ScoreRequest:
        made = VLLMScoreRequest if self.form == "vllm" else ScoreRequest
        return made(self.endpoint.model, tuple(items), self.endpoint.extra)

    async def _ask(self, client: ChatClient, request: ScoreRequest) -> Sequence[Value]:
        """The values of a batch; each is the error if the call fails."""
        try:
            async with asyncio.timeout(self.time_limit_s):
                return (await client.ask(request)).values
        except TimeoutError:
            failure = ScoreFailed(f"the scorer has not answered within its time_limit_s={self.time_limit_s:g}")
            return [failure] * len(request.items)
        except Exception as error:
            return [error] * len(request.items)


def scored_item(completion: Completion, row: Row) -> Item:
    """What a scorer is sent of a completion: its text, and the row's question, answer, media files and metadata."""
    item: dict[str, Any] = {
        "id": row.id,
        "prompt": row.problem,
        "completion": completion.text,
        "answer": row.answer,
        "task": row.task,
        "category": row.category,
        "videos": list(row.videos),
        "images": list(row.images),
        "metadata": dict(row.metadata),
    }
    if row.messages:
        item["messages"] = [dict(message) for message in row.messages]
    written = json.dumps(item, default=str)  # what JSON has no form for goes as its text
    return dict(json.loads(written))


def _value(score: Any) -> Value:
    """A score as a server writes it."""
    if isinstance(score, dict) and "error" in score:
        return ScoreFailed(f"the scorer said: {str(score['error'])[:300]}")
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return ScoreFailed(f"a score must be a finite number, null or an error, got {str(score)[:100]!r}")
    return float(score)


def _usage(answer: Mapping[str, Any]) -> dict[str, int]:
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counts.items() if isinstance(count, int)}
