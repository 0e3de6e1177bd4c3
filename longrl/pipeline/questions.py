"""Steps question and rewrite: what the writer asks about a video, and its reasoning as one text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from longrl.chat.client import ReplyCache
from longrl.chat.endpoint import Reply, Request
from longrl.pipeline.asking import Task, Unusable, answered_text, ask_all
from longrl.pipeline.captions import told
from longrl.pipeline.config import PipelineConfig
from longrl.pipeline.parsing import Question, parse_question
from longrl.pipeline.prompt_folder import Prompts
from longrl.pipeline.validation import NAMES_LETTER, SPEAKS_OF_SOURCE, TAGS
from longrl.pipeline.workspace import Record, Report, Workspace

LENGTHS = (0.3, 4.0)
"""A rewritten reasoning may have so many times the characters of the steps, and room for a sentence more."""
SENTENCE_CHARS = 200


def question(
    config: PipelineConfig, workspace: Workspace, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> None:
    """Writes one reply per video, category, kind and number; `validate` reads them."""
    videos, options = workspace.read("timeline"), config.question
    endpoint, prompts = config.endpoint("writer"), Prompts(config.prompts)
    items = [
        {"id": f"{video['video']}#{category}#{kind}#{n}", "category": category, "kind": kind, "n": n, "of": video}
        for video in videos
        for category in options.categories
        for kind in options.kinds
        for n in range(options.per_video)
    ]

    def request(item: Record, attempt: int) -> Request:
        messages = ({"role": "user", "content": _question_prompt(item, config, prompts)},)
        number = item["n"] * options.attempts + attempt
        return Request(endpoint.model, messages, options.decoding, number, endpoint.extra)

    def read(reply: Reply, item: Record) -> str:
        text = answered_text(reply)
        parse_question(text, item["kind"])
        return text

    advance(len(items))
    task = Task(_id, request, read, options.attempts)
    texts = ask_all(items, task, endpoint, replies, report, lambda: advance(0))
    usable = (
        {**{key: item[key] for key in ("id", "category", "kind")}, "video": item["of"]["video"], "text": text}
        for item, text in zip(items, texts, strict=True)
        if text is not None
    )
    workspace.write("question", usable)


def _question_prompt(item: Record, config: PipelineConfig, prompts: Prompts) -> str:
    category, video = item["category"], item["of"]
    with_box = config.question.boxes and category == "spatial"
    return prompts.text(
        "question",
        about=prompts.text("question_" + category.replace(" ", "_")),
        format=prompts.text(f"format_{item['kind']}", count=str(config.question.num_options)),
        boxes=prompts.text("question_boxes") if with_box else "",
        timeline=told(video["told"]),
        seconds=f"{video['duration_s']:.1f}",
    )


def _id(record: Record) -> str:
    return str(record["id"])


# ------------------------------------------------------------------------------------------------------------ rewrite


def rewrite(
    config: PipelineConfig, workspace: Workspace, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> None:
    """Writes each question with its `reasoning` as one text; None where no rewriting was usable: it serves RL alone."""
    records, options = workspace.read("validate"), config.rewrite
    endpoint, prompts = config.endpoint("writer"), Prompts(config.prompts)
    times = prompts.text("rewrite_keep_times" if options.timestamps else "rewrite_drop_times")

    def request(record: Record, attempt: int) -> Request:
        asked = Question.of(record)
        listed = "\n".join(f"- {option}" for option in asked.options)
        text = prompts.text(
            "rewrite",
            question=asked.question + (f"\nOptions:\n{listed}" if listed else ""),
            answer=asked.answer,
            reasoning=steps_text(asked),
            times=times,
        )
        return Request(endpoint.model, ({"role": "user", "content": text},), options.decoding, attempt, endpoint.extra)

    advance(len(records))
    task = Task(_id, request, lambda reply, record: rewritten(answered_text(reply), record), options.attempts)
    texts = ask_all(records, task, endpoint, replies, report, lambda: advance(0))
    report.counts["without reasoning, for RL alone"] = sum(text is None for text in texts)
    workspace.write("rewrite", ({**record, "reasoning": text} for record, text in zip(records, texts, strict=True)))


def steps_text(asked: Question) -> str:
    """Steps with their times, one per line."""
    return "\n".join(f"[{step.start_s:.1f} s to {step.end_s:.1f} s] {step.text}" for step in asked.steps)


def rewritten(text: str, record: Record) -> str:
    """A rewritten reasoning.

    Raises:
        Unusable: it speaks of captions, names a letter, has tags, or is much shorter or longer than the steps.
    """
    steps = " ".join(step["text"] for step in record["steps"])
    shortest, longest = LENGTHS[0] * len(steps) - SENTENCE_CHARS, LENGTHS[1] * len(steps) + SENTENCE_CHARS
    if SPEAKS_OF_SOURCE.search(text):
        raise Unusable("speaks of captions", text)
    if NAMES_LETTER.search(text):
        raise Unusable("names a letter", text)
    if TAGS.search(text):
        raise Unusable("has tags", text)
    if not shortest <= len(text) <= longest:
        raise Unusable("too short or long", f"{len(text)} characters for {len(steps)} of the steps: {text[:200]}")
    return text.strip()
