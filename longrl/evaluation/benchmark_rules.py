"""Scoring rules of benchmarks' own released code, in [0, 1], as a second score beside ours (`protocol.rule`).

As in `published_rules.py` they are stated as they are, quirks included; docs/benchmarks.md says where they differ from
the strict and robust scores. Thinking is taken off first, which the released code knows nothing of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from longrl.evaluation.published_rules import lmms_eval_choice
from longrl.rewards.answers import after_thinking
from longrl.rewards.options import parse_options
from longrl.rewards.temporal_iou import gold_intervals
from longrl.types import Completion, Row

Span = tuple[float, float]
CLOCK = re.compile(r"\b(\d{1,2}:\d{2}:\d{2}(?:\.\d+)?|\d{1,2}:\d{2}(?:\.\d+)?)\b")
CLOCK_RANGE = re.compile(r"\b(\d{1,2}:\d{2}(?::\d{2})?)\s*[\u2013-]\s*(\d{1,2}:\d{2}(?::\d{2})?)\b")
PLAIN_CLOCK = re.compile(r"\b\d{1,2}:\d{2}(?::\d{2})?\b")
PLAIN_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s*[\u2013-]\s*(\d+(?:\.\d+)?)")
SECONDS_RANGE = re.compile(r"(\d+(?:\.\d+)?)\s*s?\s*[\u2013-]\s*(\d+(?:\.\d+)?)\s*s?")
NUMBER = re.compile(r"\b\d+(?:\.\d+)?\b")
GROUNDING_WORDS = ("start", "end", "happen")
THRESHOLDS = np.linspace(0.5, 0.95, 10)


def lmms_eval_option(completion: Completion, row: Row) -> float:
    """1.0 if the letter that lmms-eval reads, among all that the question lists, is the answer (`mcq_extract.py`)."""
    letters = parse_options(row.problem)
    return float(lmms_eval_choice(after_thinking(completion.text), letters) == row.answer)


# ---- VSI-Bench ----


def vsi_bench_score(completion: Completion, row: Row) -> float:
    """Score of VSI-Bench (arXiv:2412.14171, `vsibench/utils.py`): exact letter, or mean relative accuracy of a number.

    Of the answer its first word counts, without stops behind it: "The answer is B" is wrong, and so is "three". A
    relative error that is equal to a threshold is within it.
    """
    word = after_thinking(completion.text).split(" ")[0].rstrip(".").strip()
    if row.task == "multiple_choice":
        return float(word.lower() == row.answer.lower())
    try:
        said, gold = float(word), float(row.answer)
    except ValueError:
        return 0.0
    if gold == 0:
        return 0.0
    return float((abs(said - gold) / gold <= 1 - THRESHOLDS).mean())


# ---- temporal grounding ----


def timelens_iou(completion: Completion, row: Row) -> float:
    """IoU of the first two times of an answer, in whole seconds (TimeLens, arXiv:2512.14698, `compute_metrics.py`).

    Clock times count first, then "12 - 20" and "12 to 20", then any two numbers.
    """
    text = after_thinking(completion.text).lower()
    times = [_clock_s(clock) for clock in CLOCK.findall(text)]
    span = _first_pair(times)
    for pattern in (r"(\d+\.?\d*)\s*-\s*(\d+\.?\d*)", r"(\d+\.?\d*)\s+to\s+(\d+\.?\d*)"):
        match = re.search(pattern, text) if span is None else None
        if match:
            span = float(match[1]), float(match[2])
    if span is None:
        span = _first_pair([float(number) for number in NUMBER.findall(text)])
    return 0.0 if span is None else _hull_iou((round(span[0]), round(span[1])), _gold_span(row))


def charades_sta_iou(completion: Completion, row: Row) -> float:
    """IoU of the times that lmms-eval reads in an answer to Charades-STA (`charades_sta/utils.py`, after TimeChat).

    Read are the lines with "start", "end" or "happen", or all where there are none: clock times with a dash, numbers
    with a dash, two clock times, the first numbers of two lines. Two times in the wrong order are turned round.
    """
    text = after_thinking(completion.text).lower().replace("a specific example is : 20.8 - 30.0 seconds", "")
    sentences = re.split(r"[!?\n]", text.replace("to", "-"))
    sentences = [one for one in sentences if any(word in one for word in GROUNDING_WORDS)] or sentences
    span = _first_range(CLOCK_RANGE, sentences) or _first_range(PLAIN_RANGE, sentences)
    span = span or _first_pair([_clock_s(clock) for one in sentences for clock in PLAIN_CLOCK.findall(one)])
    firsts = [match for one in sentences if (match := NUMBER.search(one))]
    span = span or _first_pair([float(match[0]) for match in firsts]) or _first_range(SECONDS_RANGE, sentences)
    if span is None:
        return 0.0
    return _hull_iou((min(span), max(span)), _gold_span(row))


def _first_range(pattern: re.Pattern[str], sentences: Sequence[str]) -> Span | None:
    match = next((found for one in sentences if (found := pattern.search(one))), None)
    return None if match is None else (_clock_s(match[1]), _clock_s(match[2]))


def _first_pair(times: Sequence[float]) -> Span | None:
    return (times[0], times[1]) if len(times) > 1 else None


def _clock_s(clock: str) -> float:
    """Seconds of 1:02:03.5, 2:03 or 12.5."""
    seconds = 0.0
    for part in clock.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _gold_span(row: Row) -> Span:
    first = gold_intervals(row)[0]
    return first.start_s, first.stop_s


def _hull_iou(said: Span, gold: Span) -> float:
    """Overlap over the time from the first start to the last end."""
    whole = max(said[1], gold[1]) - min(said[0], gold[0])
    return max(0.0, min(said[1], gold[1]) - max(said[0], gold[0])) / whole if whole > 0 else 0.0


# ---- CG-Bench ----


def cg_bench_score(completion: Completion, row: Row) -> float:
    """Score of CG-Bench (arXiv:2412.12075, `run/utils.py`): the letter, or IoU of intervals with those of the clues.

    Read is `result` of the first JSON block; where there is none, any capital A to H in the text that is the answer is
    right, and all numbers are starts and ends in turn. What cannot be read is wrong here; the released code asks again
    or leaves it out.
    """
    text = after_thinking(completion.text)
    is_choice = row.task == "multiple_choice"
    try:
        result = _json_result(text, quote_words=is_choice)
        if result is not None:
            return float(result == row.answer) if is_choice else _cg_bench_iou(result, row)
    except (ValueError, TypeError, LookupError):
        pass
    if is_choice:
        return float(row.answer in re.findall(r"\b[A-H]\b", text))
    numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", text)]
    if len(numbers) % 2:
        return 0.0
    return _cg_bench_iou(list(zip(numbers[::2], numbers[1::2], strict=True)), row)


def _json_result(text: str, *, quote_words: bool) -> Any:
    _, opened, rest = text.partition("```json")
    content, closed, _ = rest.partition("```")
    if not opened or not closed or not content.strip():
        return None
    if quote_words:
        content = re.sub(r"(?<=:\s)([A-Za-z_]\w*)", r'"\1"', content)
    return json.loads(content)["result"]


def _cg_bench_iou(said: Sequence[Sequence[float]], row: Row) -> float:
    """IoU of two sets of intervals, those that overlap joined; one that ends before it starts has a negative length."""
    first, second = _joined(said), _joined(gold_intervals(row))
    shared = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)
    union = sum(end - start for start, end in (*first, *second)) - shared
    return min(1.0, shared / union) if union > 0 else 0.0


def _joined(spans: Sequence[Sequence[float]]) -> list[Span]:
    joined: list[Span] = []
    for start, end in sorted(((span[0], span[1]) for span in spans), key=lambda span: span[0]):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


# ---- ActivityNet-QA ----


def activitynet_qa_exact(completion: Completion, row: Row) -> float:
    """1.0 if the answer is the reference to the letter: ActivityNet-QA's own accuracy (arXiv:1906.02467, `eval.py`)."""
    return float(after_thinking(completion.text).strip() == row.answer)
