"""Steps question and rewrite: what the writer asks about a video, and its reasoning as one text."""

from __future__ import annotations

from longrl.chat.endpoint import Reply, Request
from longrl.pipeline.asking import Task, UnusableReply, answered_text, ask_all
from longrl.pipeline.captions import shown_entries, timeline_text
from longrl.pipeline.parsing import parse_question
from longrl.pipeline.prompt_folder import Prompts
from longrl.pipeline.step_run import Record, StepRun
from longrl.pipeline.validation import NAMES_LETTER, SPEAKS_OF_SOURCE, TAGS

MIN_LENGTH_RATIO, MAX_LENGTH_RATIO = 0.3, 4.0
"""A rewritten reasoning may have so many times the characters of the steps, and room for a sentence more."""
SENTENCE_CHARS = 200
QUESTION_FORM = (
    'one JSON object with "question", "answer" and "reasoning" (a list of {"start", "end", "text"}, in seconds); where '
    'the question has options, also "options", one of which is the answer word for word'
)
REWRITING_FORM = (
    "the reasoning as plain text of about the length of its steps, without tags, letters of options or words about "
    "captions"
)


def write_questions(run: StepRun) -> None:
    """Writes one reply per video, category, kind and number; `validate` reads them."""
    options, endpoint, prompts = run.config.question, run.config.endpoint("writer"), Prompts(run.config.prompts)
    items: list[Record] = [
        {"id": f"{video['video']}#{category}#{kind}#{n}", "category": category, "kind": kind, "n": n, "of": video}
        for video in run.workspace.read("timeline")
        for category in options.categories
        for kind in options.kinds
        for n in range(options.per_video)
    ]

    def request(item: Record, attempt: int) -> Request:
        category, video = item["category"], item["of"]
        with_box = options.boxes and category == "spatial"
        text = prompts.text(
            "question",
            about=prompts.text("question_" + category.replace(" ", "_")),
            format=prompts.text(f"format_{item['kind']}", count=str(options.num_options)),
            boxes=prompts.text("question_boxes") if with_box else "",
            timeline=timeline_text(shown_entries(video)),
            seconds=f"{video['duration_s']:.1f}",
        )
        # No two questions of a kind are the same draw, however often each is asked again, by later commands too.
        first, later = divmod(attempt, options.attempts)
        sample = (first * options.per_video + item["n"]) * options.attempts + later
        return endpoint.request(text, options.decoding, sample)

    def read(reply: Reply, item: Record) -> str:
        text = answered_text(reply)
        parse_question(text, item["kind"])
        return text

    texts = ask_all(run, items, Task(request, read, QUESTION_FORM, options.attempts), endpoint)
    usable = []
    for item, text in zip(items, texts, strict=True):
        if text is not None:
            named = {key: item[key] for key in ("id", "category", "kind")}
            usable.append({**named, "video": item["of"]["video"], "text": text})
    run.workspace.write("question", usable)


def rewrite_reasoning(run: StepRun) -> None:
    """Writes each question with its `reasoning` as one text; None where no rewriting was usable: it serves RL alone."""
    records, options = run.workspace.read("validate"), run.config.rewrite
    endpoint, prompts = run.config.endpoint("writer"), Prompts(run.config.prompts)
    times = prompts.text("rewrite_keep_times" if options.timestamps else "rewrite_drop_times")

    def request(record: Record, attempt: int) -> Request:
        question, steps = record["question"], timeline_text(record["steps"])
        if record["options"]:
            question = "\n".join([question, "Options:", *(f"- {option}" for option in record["options"])])
        text = prompts.text("rewrite", question=question, answer=record["answer"], reasoning=steps, times=times)
        return endpoint.request(text, options.decoding, attempt)

    def read(reply: Reply, record: Record) -> str:
        return check_rewriting(answered_text(reply), record)

    texts = ask_all(run, records, Task(request, read, REWRITING_FORM, options.attempts), endpoint)
    run.report.counts["without reasoning, for RL alone"] = sum(text is None for text in texts)
    run.workspace.write("rewrite", ({**record, "reasoning": text} for record, text in zip(records, texts, strict=True)))


def check_rewriting(text: str, record: Record) -> str:
    """A rewritten reasoning without the spaces around it.

    Raises:
        UnusableReply: it speaks of captions, names a letter, has tags, or is much shorter or longer than the steps.
    """
    forbidden = {"speaks of captions": SPEAKS_OF_SOURCE, "names a letter": NAMES_LETTER, "has tags": TAGS}
    for kind, pattern in forbidden.items():
        if pattern.search(text):
            raise UnusableReply(kind, text)
    num_chars = len(" ".join(step["text"] for step in record["steps"]))
    shortest, longest = MIN_LENGTH_RATIO * num_chars - SENTENCE_CHARS, MAX_LENGTH_RATIO * num_chars + SENTENCE_CHARS
    if not shortest <= len(text) <= longest:
        message = f"{len(text)} characters for {num_chars} of the steps: {text[:200]}"
        raise UnusableReply("too short or long", message)
    return text.strip()
