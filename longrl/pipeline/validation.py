"""Step validate: what is wrong with a question, rule by rule, and the questions without fault."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from longrl.pipeline.asking import UnusableReply, mostly_latin
from longrl.pipeline.config import QuestionOptions, ValidateOptions
from longrl.pipeline.parsing import ParsedQuestion, parse_question
from longrl.pipeline.step_run import Record, StepRun
from longrl.rewards.exact import normalized_text

SPEAKS_OF_SOURCE = re.compile(
    r"\b(?:captions?|captioned|timelines?|transcripts?|descriptions? (?:says?|states?|mentions?)|"
    r"according to the (?:text|descriptions?)|timestamps?)\b",
    re.IGNORECASE,
)
NAMES_LETTER = re.compile(
    r"\b(?:options?|choices?|answers?(?: is| would be)?)\s*[:(]?\s*[A-H]\b(?!\s*')|\([A-H]\)|"
    r"\b[A-H] is (?:correct|right)"
)
TAGS = re.compile(r"</?\s*(?:think|answer|image|video)\s*>", re.IGNORECASE)
ALL_OR_NONE = re.compile(r"\b(?:all|none|both|neither) of the (?:above|options|others?)\b", re.IGNORECASE)
SLACK_S = 1.0
"""A model that reads times in tenths of a second may round the video's end up; steps are then cut at the end."""
Fault = tuple[str, str]
"""Kind and explanation."""


def validate_questions(run: StepRun) -> None:
    """Writes the questions without fault, and beside them the rejected ones with their faults."""
    replies, config, report = run.workspace.read("question"), run.config, run.report
    durations = {video["video"]: video["duration_s"] for video in run.workspace.read("timeline")}
    accepted: list[Record] = []
    rejected: list[Record] = []
    by_video: dict[str, list[str]] = defaultdict(list)
    run.add_items(len(replies))
    for reply in replies:
        video = reply["video"]
        question = None
        try:
            question = cut_steps_at(parse_question(reply["text"], reply["kind"]), durations[video])
            boxes = config.question.boxes and reply["category"] == "spatial"
            limits = (config.question, config.validate, boxes)
            faults = list(find_faults(question, durations[video], by_video[video], *limits))
        except UnusableReply as error:
            faults = [(error.kind, str(error))]
        for kind, text in faults:
            report.add_problem(reply["id"], kind, text)
        if question is None or faults:
            rejected.append({**reply, "faults": [list(fault) for fault in faults]})
        else:
            by_video[video].append(question.question)
            accepted.append({**{key: reply[key] for key in ("id", "video", "category")}, **asdict(question)})
        run.finish_item()
    report.items = report.done = len(replies)
    report.counts.update({"accepted": len(accepted), "rejected": len(rejected)})
    report.counts.update(f"accepted: {record['category']}, {record['kind']}" for record in accepted)
    # The accuracy of whoever always takes the longest option.
    choices = [record for record in accepted if record["options"]]
    longest = sum(max(record["options"], key=len) == record["answer"] for record in choices)
    report.calls["longest option is right"] = round(longest / max(1, len(choices)), 4)
    run.workspace.write("validate", accepted)
    run.workspace.write_beside("validate", "rejected", rejected)


def cut_steps_at(question: ParsedQuestion, duration_s: float) -> ParsedQuestion:
    """The question with steps that end up to `SLACK_S` behind the video cut at its end."""
    last_s = duration_s + SLACK_S
    steps = [
        replace(step, end_s=min(step.end_s, duration_s)) if step.end_s <= last_s else step for step in question.steps
    ]
    return replace(question, steps=tuple(steps))


def find_faults(
    question: ParsedQuestion,
    duration_s: float,
    earlier: Sequence[str],
    expected: QuestionOptions,
    options: ValidateOptions,
    boxes: bool = False,
) -> Iterator[Fault]:
    """Finds all faults of a question.

    Args:
        question: as parsed.
        duration_s: of its video.
        earlier: questions accepted for the same video.
        expected: how many options it should have.
        options: limits.
        boxes: whether it must name a box.
    """
    if question.kind == "multiple_choice":
        yield from _option_faults(question, expected.num_options, options)
    elif len(question.answer.split()) > options.max_answer_words:
        yield "answer too long", f"{len(question.answer.split())} words, validate.max_answer_words allows fewer"
    # A question that names the answer and another option is fair.
    words = f" {normalized_text(question.question)} "
    candidates = question.options or (question.answer,)
    if [text for text in candidates if f" {normalized_text(text)} " in words] == [question.answer]:
        yield "answer in the question", f"{question.answer!r} stands in {question.question!r}"
    texts = [question.question, *question.options, question.answer]
    if TAGS.search(" ".join([*texts, *(step.text for step in question.steps)])):
        yield "has tags", "think and answer tags mark the answer in training, and nothing else"
    if SPEAKS_OF_SOURCE.search(" ".join(texts)):
        yield "speaks of captions", question.question
    if len(question.steps) < options.min_steps:
        yield "no reasoning", f"{len(question.steps)} steps, validate.min_steps wants {options.min_steps}"
    for step in question.steps:
        if not 0 <= step.start_s < step.end_s <= duration_s:
            yield "times outside the video", f"{step.start_s:g} to {step.end_s:g} s in a video of {duration_s:g} s"
    if question.box is not None:
        x0, y0, x1, y1 = question.box
        if not (0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000):
            yield "bad box", f"{list(question.box)} must be [x0, y0, x1, y1] in thousandths, x0 < x1 and y0 < y1"
        if question.box_at_s is None or not 0 <= question.box_at_s <= duration_s:
            yield "times outside the video", f"the box is seen at {question.box_at_s} s in a video of {duration_s:g} s"
    elif boxes:
        yield "no box", "question.boxes is on, but the question has none"
    if any(NAMES_LETTER.search(step.text) for step in question.steps):
        yield "names a letter", "the reasoning names an option by its letter, but letters are dealt later"
    twin = next((text for text in earlier if triple_similarity(text, question.question) > options.max_similarity), None)
    if twin is not None:
        yield "duplicate", f"{question.question!r} repeats {twin!r}"
    if options.english_only and not mostly_latin(question.question):
        yield "not English", question.question


def _option_faults(question: ParsedQuestion, count: int, options: ValidateOptions) -> Iterator[Fault]:
    texts = question.options
    if len(texts) != count:
        yield "wrong number of options", f"{len(texts)} instead of {count}"
    if len({normalized_text(text) for text in texts}) < len(texts):
        yield "equal options", f"{list(texts)}"
    if any(ALL_OR_NONE.search(text) for text in texts):
        yield "all or none of the above", f"{list(texts)}"
    right = len(question.answer)
    wrong = [len(text) for text in texts if text != question.answer] or [right]
    if _exceeds(right, max(wrong), options) or _exceeds(min(wrong), right, options):
        yield "length tells the answer", f"{question.answer!r} among {[len(text) for text in texts]} characters"


def _exceeds(length: int, other: int, options: ValidateOptions) -> bool:
    """True if a text is so much longer than another that a reader notices."""
    return length > options.max_length_ratio * other and length - other > options.length_slack


def triple_similarity(first: str, second: str) -> float:
    """Jaccard similarity of the character triples of two texts, 0 to 1; any script."""
    one, other = _triples(first), _triples(second)
    return len(one & other) / len(one | other)


def _triples(text: str) -> set[str]:
    padded = f"  {normalized_text(text)} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}
