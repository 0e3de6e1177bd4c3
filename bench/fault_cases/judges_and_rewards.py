"""Rewards and judges that fail on one row: its completions are left out of the loss, and one line says so."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fault_cases.fault import Fault, Outcome
from fault_cases.small_runs import Config, Ended, command, fit, kept_checkpoint, steps_lost, text_rows, text_run
from longrl.io.exit_codes import MISTAKE
from longrl.rewards import judge
from tests.chat.server import Server, completion
from tests.runs import arguments, rollouts

BROKEN = "q3"
"""The row on which rewards and judges fail."""
QUESTION = "What is 3 and 3?"
SAID = "they are left out of the loss"
STEPS = 6


# ---- rewards ----


def well(completion: Any, row: Any) -> float:
    """Half of all completions are right."""
    return float(int(completion.token_ids.sum()) % 2)


def raises(completion: Any, row: Any) -> Any:
    """An error of the reward's own."""
    return well(completion, row) if row.id != BROKEN else {}["missing"]


def raises_always(completion: Any, row: Any) -> Any:
    """A reward that judges nothing."""
    return {}["missing"]


def says_none(completion: Any, row: Any) -> Any:
    """Does not apply."""
    return well(completion, row) if row.id != BROKEN else None


def says_inf(completion: Any, row: Any) -> Any:
    """Divides by something small."""
    return well(completion, row) if row.id != BROKEN else math.inf


def says_nan(completion: Any, row: Any) -> Any:
    """A mean of nothing."""
    return well(completion, row) if row.id != BROKEN else math.nan


def says_huge(completion: Any, row: Any) -> Any:
    """No float32."""
    return well(completion, row) if row.id != BROKEN else 1e300


def says_list(completion: Any, row: Any) -> Any:
    """One value for each of something."""
    return well(completion, row) if row.id != BROKEN else [1.0, 0.0]


def says_complex(completion: Any, row: Any) -> Any:
    """The root of a negative number."""
    return well(completion, row) if row.id != BROKEN else (-8) ** 0.5


def recurses(completion: Any, row: Any) -> Any:
    """Without end."""
    return well(completion, row) if row.id != BROKEN else recurses(completion, row)


def fills_memory(completion: Any, row: Any) -> Any:
    """More than there is."""
    return well(completion, row) if row.id != BROKEN else len(bytearray(1 << 60))


def asserts(completion: Any, row: Any) -> Any:
    """A check of its own."""
    assert row.id != BROKEN, "a \x1b[2Jrow that I do not know"
    return well(completion, row)


def sleeps(completion: Any, row: Any) -> Any:
    """Longer than `time_limit_s`."""
    if row.id == BROKEN:
        time.sleep(1000)
    return well(completion, row)


def rewarded(reward: Callable[..., Any], words: str = SAID) -> Callable[[Path], Outcome]:
    """An RL run with a reward of this file."""

    def run(folder: Path) -> Outcome:
        values = text_run(folder, "rl", steps=STEPS)
        values["rollout"] = rollouts(f"{__file__}:{reward.__name__}")
        values["rollout"]["reward"]["time_limit_s"] = 1.0
        return outcome(folder, fit(folder, values), words)

    return run


def outcome(folder: Path, ended: Ended, words: str) -> Outcome:
    """What a run led to, by the line with the words."""
    return Outcome(ended.line_with(words), ended.exit_code, kept_checkpoint(folder), steps_lost(folder))


# ---- judges ----


def closes(body: Any) -> Any:
    """Ends the connection instead of an answer."""
    raise ConnectionResetError


def content(value: Any) -> dict[str, Any]:
    """A chat completion whose content is no text."""
    return {"choices": [{"message": {"role": "assistant", "content": value}, "finish_reason": "stop"}]}


def judged(reply: Any, words: str = SAID) -> Callable[[Path], Outcome]:
    """An RL run whose judge gives the reply about one row, and is well otherwise."""

    def answer(body: dict[str, Any]) -> Any:
        text = body["messages"][0]["content"]
        if QUESTION in text:
            return reply(body) if callable(reply) else reply
        return completion(f"SCORE: {len(text) % 2}")

    def run(folder: Path) -> Outcome:
        with Server(answer) as server:
            server.http.handle_error = lambda *_: None
            values = judged_run(folder, server)
            ended = command(arguments(folder / "run", values), folder, before=ask_about_all)
        return outcome(folder, ended, words)

    return run


def judged_run(folder: Path, server: Server) -> Config:
    """An RL run on open-ended questions."""
    rows = [{**row, "task": "open_ended"} for row in text_rows()]
    values = text_run(folder, "rl", rows, steps=STEPS)
    endpoint = {"model": "j", "url": server.url, "backoff_s": 0.01, "retries": 1, "timeout_s": 5.0}
    options = {"endpoint": endpoint, "cache_dir": str(folder / "replies")}
    values["rollout"] = rollouts({"class_path": "longrl.rewards.judge.Judge", "init_args": options})
    return values


def ask_about_all() -> None:
    """A random model's answers have no tag, and would be wrong without the judge being asked."""
    judge.strict_text = lambda text: text.strip() or "nothing"


def row(kind: str, fault: str, does: Callable[[Path], Outcome], seen: str = SAID, exit_code: int = 0) -> Fault:
    """The run goes on to its end, and nothing is lost."""
    return Fault(kind, fault, does, exit_code, seen)


QUICK = [
    row("rewards", "a reward raises on one row", rewarded(raises), r"row 'q3' \(KeyError"),
    row("rewards", "a reward raises on every row", rewarded(raises_always, "failed on every one"), "KeyError", MISTAKE),
    row("rewards", "a reward is None on one row", rewarded(says_none), "no reward applies"),
    row("rewards", "a reward recurses without end", rewarded(recurses), "RecursionError"),
    row("rewards", "a reward takes longer than time_limit_s", rewarded(sleeps), "time_limit_s"),
    row("judges", "a judge's server errs (500)", judged(500), "HTTP 500"),
    row("judges", "a judge's reply is nested 100,000 times", judged(b"[" * 100_000)),
    row("judges", "a judge's content is a list of numbers", judged(content([1]))),
    row("judges", "a judge closes the connection", judged(closes)),
]
MORE = [
    row("rewards", "a reward is infinite", rewarded(says_inf)),
    row("rewards", "a reward is nan", rewarded(says_nan)),
    row("rewards", "a reward is beyond float32", rewarded(says_huge)),
    row("rewards", "a reward is a list", rewarded(says_list)),
    row("rewards", "a reward is complex", rewarded(says_complex)),
    row("rewards", "a reward runs out of memory", rewarded(fills_memory), "MemoryError"),
    row("rewards", "a reward asserts, with an escape sequence in its text", rewarded(asserts), "AssertionError"),
    row("judges", "a judge's server refuses the key (401)", judged(401), "HTTP 401"),
    row("judges", "a judge's server is busy (429)", judged(429), "HTTP 429"),
    row("judges", "a judge's reply is cut", judged(b'{"choices": [{"mess')),
    row("judges", "a judge's reply is a web page", judged(b"<html><script>alert(1)</script></html>")),
    row("judges", "a judge's reply is no UTF-8", judged(b'{"choices": "\xff\xfe"}')),
    row("judges", "a judge's content is null", judged(content(None)), "has no score"),
    row("judges", "a judge's score is nan", judged(completion("SCORE: nan")), "has no score"),
]
FAULTS = [*QUICK, *(replace(fault, quick=False) for fault in MORE)]
