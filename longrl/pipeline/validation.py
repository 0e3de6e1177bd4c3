"""Step validate: what is wrong with a question, rule by rule, and the questions without fault."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from longrl.pipeline.asking import UnusableReply, mostly_latin
from longrl.pipeline.config import PipelineConfig, QuestionOptions, ValidateOptions
from longrl.pipeline.parsing import Question, Step, parse_question
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
    workspace, report = run.workspace, run.report
    replies = workspace.read("question")
    durations = {video["video"]: video["duration_s"] for video in workspace.read("timeline")}
    accepted: list[Record] = []
    rejected: list[Record] = []
    by_video: dict[str, list[str]] = {}
    run.add_items(len(replies))
    for reply in replies:
        report.items += 1
        earlier = by_video.setdefault(reply["video"], [])
        question, faults = judge_reply(reply, durations[reply["video"]], earlier, run.config)
        for kind, text in faults:
            report.add_problem(reply["id"], kind, text)
        if question is None or faults:
            rejected.append({**reply, "faults": [list(fault) for fault in faults]})
        else:
            earlier.append(question.question)
            accepted.append({**{key: reply[key] for key in ("id", "video", "category")}, **question.to_dict()})
        run.finish_item()
    report.done = len(replies)
    report.counts["accepted"], report.counts["rejected"] = len(accepted), len(rejected)
    report.counts.update(f"accepted: {record['category']}, {record['kind']}" for record in accepted)
    report.calls |= {"longest option is right": _longest_is_right(accepted)}
    workspace.write("validate", accepted)
    workspace.write_beside("validate", "rejected", rejected)


def judge_reply(
    reply: Record, duration_s: float, earlier: Sequence[str], config: PipelineConfig
) -> tuple[Question | None, list[Fault]]:
    """The question of a reply and all its faults; None for a reply that holds none.

    Args:
        reply: with its `text`, `kind` and `category`.
        duration_s: of its video.
        earlier: questions accepted for the same video.
        config: limits.
    """
    try:
        question = parse_question(reply["text"], reply["kind"])
    except UnusableReply as error:
        return None, [(error.kind, str(error))]
    question = cut_steps_at(question, duration_s)
    boxes = config.question.boxes and reply["category"] == "spatial"
    return question, list(find_faults(question, duration_s, earlier, config.question, config.validate, boxes))


def cut_steps_at(question: Question, duration_s: float) -> Question:
    """The question with steps that end up to `SLACK_S` behind the video cut at its end."""
    steps = tuple(
        replace(step, end_s=duration_s) if duration_s < step.end_s <= duration_s + SLACK_S else step
        for step in question.steps
    )
    return replace(question, steps=steps)


def find_faults(
    question: Question,
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
    if _gives_answer_away(question):
        yield "answer in the question", f"{question.answer!r} stands in {question.question!r}"
    texts = [question.question, *question.options, question.answer]
    if TAGS.search(" ".join([*texts, *(step.text for step in question.steps)])):
        yield "has tags", "think and answer tags mark the answer in training, and nothing else"
    if SPEAKS_OF_SOURCE.search(" ".join(texts)):
        yield "speaks of captions", question.question
    yield from _time_faults(question.steps, duration_s, options.min_steps)
    yield from _box_faults(question, duration_s, boxes)
    if any(NAMES_LETTER.search(step.text) for step in question.steps):
        yield "names a letter", "the reasoning names an option by its letter, but letters are dealt later"
    twin = next((text for text in earlier if triple_similarity(text, question.question) > options.max_similarity), None)
    if twin is not None:
        yield "duplicate", f"{question.question!r} repeats {twin!r}"
    if options.english_only and not mostly_latin(question.question):
        yield "not English", question.question


def _option_faults(question: Question, count: int, options: ValidateOptions) -> Iterator[Fault]:
    texts = question.options
    if len(texts) != count:
        yield "wrong number of options", f"{len(texts)} instead of {count}"
    if len({normalized_text(text) for text in texts}) < len(texts):
        yield "equal options", f"{list(texts)}"
    if any(ALL_OR_NONE.search(text) for text in texts):
        yield "all or none of the above", f"{list(texts)}"
    if _stands_out(question, options.max_length_ratio, options.length_slack):
        yield "length tells the answer", f"{question.answer!r} among {[len(text) for text in texts]} characters"


def _stands_out(question: Question, ratio: float, slack: int) -> bool:
    """True if the right option is much longer than all others, or much shorter."""
    right = len(question.answer)
    others = [len(text) for text in question.options if text != question.answer]
    if not others:
        return False
    longer = right > ratio * max(others) and right - max(others) > slack
    return longer or (min(others) > ratio * right and min(others) - right > slack)


def _gives_answer_away(question: Question) -> bool:
    """True if the question holds the full answer and no wrong option; a question that names two is fair."""
    text = f" {normalized_text(question.question)} "
    contained = [each for each in (question.options or (question.answer,)) if f" {normalized_text(each)} " in text]
    return contained == [question.answer]


def _time_faults(steps: Sequence[Step], duration_s: float, min_steps: int) -> Iterator[Fault]:
    if len(steps) < min_steps:
        yield "no reasoning", f"{len(steps)} steps, validate.min_steps wants {min_steps}"
    for step in steps:
        if not 0 <= step.start_s < step.end_s <= duration_s:
            yield "times outside the video", f"{step.start_s:g} to {step.end_s:g} s in a video of {duration_s:g} s"


def _box_faults(question: Question, duration_s: float, is_required: bool) -> Iterator[Fault]:
    if question.box is None:
        if is_required:
            yield "no box", "question.boxes is on, but the question has none"
        return
    x0, y0, x1, y1 = question.box
    if not (0 <= x0 < x1 <= 1000 and 0 <= y0 < y1 <= 1000):
        yield "bad box", f"{list(question.box)} must be [x0, y0, x1, y1] in thousandths, x0 < x1 and y0 < y1"
    if question.box_at_s is None or not 0 <= question.box_at_s <= duration_s:
        yield "times outside the video", f"the box is seen at {question.box_at_s} s in a video of {duration_s:g} s"


def triple_similarity(first: str, second: str) -> float:
    """Jaccard similarity of the character triples of two texts, 0 to 1; any script."""
    one, other = _triples(first), _triples(second)
    return len(one & other) / len(one | other)


def _triples(text: str) -> set[str]:
    padded = f"  {normalized_text(text)} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def _longest_is_right(records: Sequence[Record]) -> float:
    """Share of multiple-choice questions that "take the longest option" answers."""
    with_options = [record for record in records if record["options"]]
    right = sum(max(record["options"], key=len) == record["answer"] for record in with_options)
    return round(right / len(with_options), 4) if with_options else 0.0
