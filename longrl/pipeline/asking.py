"""One question to a model per item: many at once, asked again until a reply is usable, results in the items' order."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from longrl.chat.client import BudgetSpent, CallFailed, ChatClient, ReplyCache
from longrl.chat.endpoint import Endpoint, Reply, Request
from longrl.chat.event_loop import run_async, run_workers
from longrl.pipeline.video_frames import BrokenVideo
from longrl.rewards.answer_text import after_thinking

if TYPE_CHECKING:
    from longrl.pipeline.workspace import Report

I = TypeVar("I")  # noqa: E741
V = TypeVar("V")

REFUSAL = re.compile(
    r"\s*(?:i['\u2019]?m (?:very )?sorry|sorry,|i apologi[sz]e|as an ai\b|unfortunately,? i can|"
    r"i (?:can ?not|can['\u2019]t|am (?:not able|unable)|won['\u2019]t))",
    re.IGNORECASE,
)
MAX_REFUSAL_CHARS = 400
"""A longer text that begins like a refusal is an answer."""


class Unusable(ValueError):
    """A reply that is none: `kind` is what it is counted under."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def answered_text(reply: Reply) -> str:
    """What a model says after its thinking.

    Raises:
        Unusable: nothing, or a refusal.
    """
    text = after_thinking(reply.text).strip()
    if reply.refusal is not None or reply.finish_reason == "content_filter":
        raise Unusable("refused", reply.refusal or text or "content filter")
    if not text:
        raise Unusable("cut" if reply.finish_reason == "length" else "empty", f"no text ({reply.finish_reason})")
    if len(text) <= MAX_REFUSAL_CHARS and REFUSAL.match(text):
        raise Unusable("refused", text)
    return text


@dataclass(frozen=True)
class Task(Generic[I, V]):
    """What to ask about each item, and how to read the reply.

    Example:
        `Task(name=lambda clip: clip["id"], request=make_request, read=answered_text, attempts=3)`
    """

    name: Callable[[I], str]
    request: Callable[[I, int], Request]
    """Of an item and the number of the attempt."""
    read: Callable[[Reply, I], V]
    """Raises `Unusable` to ask again."""
    attempts: int = 1


def ask_all(
    items: Sequence[I],
    task: Task[I, V],
    endpoint: Endpoint,
    replies: ReplyCache,
    report: Report,
    advance: Callable[[], Any],
) -> list[V | None]:
    """The result of every item, in order; None where there is none, which the report then says.

    Args:
        items: what to ask about.
        task: how.
        endpoint: whom.
        replies: replies of this and earlier runs.
        report: is filled.
        advance: called after each item.

    Raises:
        ValueError: the budget is spent, too many items failed, or the endpoint refuses every call.
    """
    results: list[V | None] = [None] * len(items)
    rest = iter(enumerate(items))

    async def work(client: ChatClient) -> None:
        for index, item in rest:
            results[index] = await _ask_one(client, item, task, report)
            advance()

    async def all_of_them() -> None:
        async with ChatClient(endpoint, replies) as client:
            before = dict(vars(replies.spent))
            try:
                await run_workers([work(client) for _ in range(min(endpoint.concurrency, len(items)))])
            finally:
                _count(report, client, before)

    if items:
        run_async(all_of_them)
    report.check()
    return results


async def _ask_one(client: ChatClient, item: I, task: Task[I, V], report: Report) -> V | None:
    name, problem = task.name(item), ""
    report.items += 1
    for attempt in range(task.attempts):
        try:
            request = await asyncio.to_thread(task.request, item, attempt)  # may read a file
            reply = await client.ask(request)
            value = task.read(reply, item)
        except Unusable as error:
            report.problem(name, error.kind, str(error))
            problem = f"no usable reply in {task.attempts} attempts, the last: {error}"
            continue
        except (CallFailed, BrokenVideo) as error:
            kind = error.kind if isinstance(error, CallFailed) else "broken video"
            report.problem(name, kind, str(error))
            problem = str(error)
            break
        except BudgetSpent:
            report.left += 1
            return None
        report.done += 1
        _count_reply(report, reply)
        return value
    report.failed += 1
    report.problem(name, "given up", problem)
    return None


def _count_reply(report: Report, reply: Reply) -> None:
    report.counts["cut replies used"] += reply.finish_reason == "length"
    report.counts["broken frames"] += reply.broken_images
    report.counts["replies mostly not in Latin script"] += not mostly_latin(reply.text)
    report.counts += type(report.counts)()  # drops zeros


def mostly_latin(text: str) -> bool:
    """Whether at least half of a text's letters are Latin; True for a text without letters."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(character < "\u0250" for character in letters) >= len(letters)


def _count(report: Report, client: ChatClient, before: dict[str, float]) -> None:
    spent = client.replies.spent
    found = {
        "calls": client.num_calls,
        "replies from disk": client.num_cached,
        "failed attempts": client.num_failed_attempts,
        **{name: round(value - before[name], 6) for name, value in vars(spent).items() if name != "calls"},
    }
    report.calls = {name: round(report.calls.get(name, 0) + value, 6) for name, value in found.items()}
