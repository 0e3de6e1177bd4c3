"""One question to a model per item: many at once, asked again until a reply is usable, results in the items' order."""

from __future__ import annotations

import asyncio
import functools
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from longrl.chat.client import BudgetSpent, CallFailed, ChatClient
from longrl.chat.endpoint import Endpoint, Reply, Request
from longrl.chat.event_loop import run_async, run_workers
from longrl.pipeline.step_run import Record, StepReport, StepRun
from longrl.pipeline.video_frames import BrokenVideo
from longrl.rewards.answers import after_thinking

Value = TypeVar("Value")

REFUSAL = re.compile(
    r"\s*(?:i['\u2019]?m (?:very )?sorry|sorry,|i apologi[sz]e|as an ai\b|unfortunately,? i can|"
    r"i (?:can ?not|can['\u2019]t|am (?:not able|unable)|won['\u2019]t))",
    re.IGNORECASE,
)
MAX_REFUSAL_CHARS = 400
"""A longer text that begins like a refusal is an answer."""


class UnusableReply(ValueError):
    """A reply that cannot be used; `kind` is what it is counted under."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def answered_text(reply: Reply) -> str:
    """Text of a reply behind the model's thinking.

    Raises:
        UnusableReply: nothing, or a refusal.
    """
    text = after_thinking(reply.text).strip()
    if reply.refusal is not None or reply.finish_reason == "content_filter":
        raise UnusableReply("refused", reply.refusal or text or "content filter")
    if not text:
        raise UnusableReply("cut" if reply.finish_reason == "length" else "empty", f"no text ({reply.finish_reason})")
    if len(text) <= MAX_REFUSAL_CHARS and REFUSAL.match(text):
        raise UnusableReply("refused", text)
    return text


@dataclass(frozen=True)
class Task(Generic[Value]):
    """Request for each item, and how its reply is read.

    Example:
        `Task(make_request, lambda reply, clip: answered_text(reply), form="one paragraph of text", attempts=3)`
    """

    request: Callable[[Record, int], Request]
    """The request for an item and the number of the attempt."""
    read: Callable[[Reply, Record], Value]
    """The value of a reply for an item; raises `UnusableReply` to ask again."""
    form: str = "text"
    """What a usable reply looks like: said when it is asked for again, and in the report."""
    attempts: int = 1
    """Of a command, beside the replies that are on disk."""
    name_suffix: str = ""
    """Behind an item's id in reports."""
    go_on: Callable[[ChatClient, Request, Reply, Record], Coroutine[Any, Any, Value]] | None = None
    """Takes the place of `read` where a reply is the first of a conversation, of which the value is made."""


def ask_all(run: StepRun, items: Sequence[Record], task: Task[Value], endpoint: Endpoint) -> list[Value | None]:
    """The result of every item, in order; None where there is none, which the run's report then says.

    Args:
        run: its report is filled.
        items: what to ask about, each with an `id`.
        task: how.
        endpoint: whom.

    Raises:
        ValueError: the budget is spent, too many items failed, or the endpoint refuses every call.
    """
    assert run.replies is not None, "the step is one that asks a model"
    replies = run.replies
    results: list[Value | None] = [None] * len(items)
    waiting = iter(enumerate(items))  # shared: each worker takes the next item when it is free
    run.add_items(len(items))

    async def work(client: ChatClient) -> None:
        for index, item in waiting:
            results[index] = await _ask_one(client, item, task, run.report)
            run.finish_item()

    async def ask_in_parallel() -> None:
        spent_before = dict(vars(replies.spent))
        async with ChatClient(endpoint, replies) as client:
            try:
                await run_workers([work(client) for _ in range(min(endpoint.concurrency, len(items)))])
            finally:
                spent = vars(replies.spent)
                calls: dict[str, float] = {"calls": client.num_calls, "replies from disk": client.num_cached}
                calls["failed attempts"] = client.num_failed_attempts
                calls |= {name: spent[name] - spent_before[name] for name in spent if name != "calls"}
                earlier = run.report.calls
                run.report.calls = {name: round(earlier.get(name, 0) + value, 6) for name, value in calls.items()}

    if items:
        run_async(ask_in_parallel)
    run.report.check()
    return results


async def _ask_one(client: ChatClient, item: Record, task: Task[Value], report: StepReport) -> Value | None:
    name, problem = f"{item['id']}{task.name_suffix}", ""
    report.items += 1
    attempts = client.attempts(functools.partial(task.request, item), task.form, task.attempts)
    while True:
        try:
            request = await asyncio.to_thread(next, attempts, None)  # may read a file
            if request is None:
                break
            reply = await client.ask(request)
            if task.go_on is None:
                value = task.read(reply, item)
            else:
                value = await task.go_on(client, request, reply, item)
        except UnusableReply as error:
            report.add_problem(name, error.kind, str(error))
            report.forms.add(task.form)
            problem = f"no usable reply, wanted is {task.form}; the last: {error}"
            continue
        except (CallFailed, BrokenVideo) as error:
            report.add_problem(name, error.kind, str(error))
            problem = str(error)
            break
        except BudgetSpent:
            report.left += 1
            return None
        report.done += 1
        report.counts["cut replies used"] += reply.finish_reason == "length"
        report.counts["broken frames"] += reply.broken_images
        report.counts["replies mostly not in Latin script"] += not mostly_latin(reply.text)
        report.counts += Counter()  # drops zeros
        return value
    report.failed += 1
    report.add_problem(name, "given up", problem)
    return None


def mostly_latin(text: str) -> bool:
    """True if at least half of a text's letters are Latin, or it has no letters."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(character < "\u0250" for character in letters) >= len(letters)
