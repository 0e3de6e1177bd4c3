"""Step filter: what a policy can answer always, never, or without the video, teaches nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longrl.chat.endpoint import Reply, Request
from longrl.datamodules.loading.templates import DEFAULT_QUESTION, fill_template
from longrl.pipeline.asking import Task, UnusableReply, ask_all
from longrl.pipeline.config import FilterOptions
from longrl.pipeline.step_run import Record, StepRun
from longrl.pipeline.video_frames import FrameSet, frame_times, middle_frames
from longrl.rewards.answers import lenient_text
from longrl.rewards.judge import SCORE_FORM, JudgementFailed, judge_request, judge_score, shared_words
from longrl.rewards.option_choice import chosen_option
from longrl.rewards.options import DEFAULT_LETTERS, with_options


def filter_questions(run: StepRun) -> None:
    """Writes the questions that stay, with how often each was answered right, and the dropped ones beside them."""
    records, options, report = run.workspace.read("rewrite"), run.config.filter, run.report
    scores = _scores(run, records) if options.num_samples else {}
    kept: list[Record] = []
    dropped: list[Record] = []
    for record in records:
        seen, blind = scores.get((record["id"], False), []), scores.get((record["id"], True), [])
        graded = {**record, "seen": _tally(seen), "blind": _tally(blind)}
        reason = reason_to_drop(seen, blind, options)
        report.counts[reason or "kept"] += 1
        if reason is None:
            kept.append(graded)
        else:
            dropped.append({**graded, "dropped": reason})
    if not options.num_samples:
        report.items = report.done = len(records)
    run.workspace.write("filter", kept)
    run.workspace.write_beside("filter", "dropped", dropped)


def reason_to_drop(seen: Sequence[float | None], blind: Sequence[float | None], options: FilterOptions) -> str | None:
    """Reason for which a question goes; None if it stays.

    Args:
        seen: scores of the answers with the video; None for one without score. [] if nobody was asked.
        blind: scores of those without.
        options: the limits. Fewer than half the answers scored is too little to tell.
    """
    if not options.num_samples:
        return None
    right = [score >= options.right_from for score in seen if score is not None]
    if 2 * len(right) < options.num_samples or len(right) < 2:
        return "dropped: too few answers"
    if all(right):
        return "dropped: always right"
    if not any(right):
        return "dropped: never right"
    guessed = [score >= options.right_from for score in blind if score is not None]
    if guessed and sum(guessed) > options.max_blind_share * len(guessed):
        return "dropped: right without the video"
    return None


def _tally(scores: Sequence[float | None]) -> Record:
    known = [score for score in scores if score is not None]
    return {"samples": len(known), "mean": round(sum(known) / len(known), 4) if known else None}


# ---- asking ----


def rotate_options(options: Sequence[str], turns: int) -> list[str]:
    """Options in another order: over all turns each stands everywhere, so that a love of letters tells nothing."""
    turns %= max(1, len(options))
    return [*options[turns:], *options[:turns]]


def _scores(run: StepRun, records: Sequence[Record]) -> dict[tuple[str, bool], list[float | None]]:
    """(question id, blind) -> score of each of the policy's answers."""
    options = run.config.filter
    items: list[Record] = []
    for record in records:
        for blind, count in ((False, options.num_samples), (True, options.blind_samples)):
            name = f"{record['id']}#{'blind' if blind else 'seen'}"
            items += [{"id": f"{name}{n}", "of": record, "blind": blind, "n": n} for n in range(count)]
    texts = _answers(run, items)
    answered = [{**item, "text": text} for item, text in zip(items, texts, strict=True) if text is not None]

    to_judge = [item for item in answered if item["of"]["kind"] == "open_ended" and lenient_text(item["text"])]
    judged = dict(zip([item["id"] for item in to_judge], _judgements(run, to_judge), strict=True))
    scores: dict[tuple[str, bool], list[float | None]] = {}
    for item in answered:
        score = judged[item["id"]] if item["id"] in judged else _choice_score(item)
        scores.setdefault((item["of"]["id"], item["blind"]), []).append(score)
    return scores


def _answers(run: StepRun, items: Sequence[Record]) -> list[str | None]:
    """The policy's answers: nothing, or a refusal, is a wrong one."""
    endpoint, options = run.config.endpoint("policy"), run.config.filter
    videos = {video["video"]: video for video in run.workspace.read("timeline")}

    def request(item: Record, attempt: int) -> Request:
        record = item["of"]
        problem = with_options(record["question"], rotate_options(record["options"], item["n"]))
        text = fill_template(DEFAULT_QUESTION, problem=problem, subtitles="")
        if item["blind"]:
            return endpoint.request(text, options.decoding, item["n"])
        video = videos[record["video"]]
        times = frame_times(video["path"])
        indices = middle_frames(times, 0, len(times.starts), options.num_frames)
        frames = FrameSet(video["path"], video["digest"], tuple(indices), options.max_side, times.index.pixel_rule)
        content = [*frames.parts(), {"type": "text", "text": text}]
        return endpoint.request(content, options.decoding, item["n"], frames.load)

    return ask_all(run, items, Task(request, lambda reply, item: reply.text), endpoint)


def _choice_score(item: Record) -> float:
    """1.0 for the right option; an open-ended question without an answer has none either."""
    options = dict(zip(DEFAULT_LETTERS, rotate_options(item["of"]["options"], item["n"]), strict=False))
    letter = chosen_option(lenient_text(item["text"]), options)
    return float(letter is not None and options[letter] == item["of"]["answer"])


def _judgements(run: StepRun, items: Sequence[Record]) -> list[float | None]:
    """Scores of open-ended answers; an answer that is equal to another one's is judged once."""
    if run.config.filter.open_ended == "text_similarity":
        return [shared_words(lenient_text(item["text"]), item["of"]["answer"]) for item in items]
    if not items:
        return []
    endpoint = run.config.endpoint("judge")

    def request(item: Record, attempt: int) -> Request:
        question, reference = item["of"]["question"], item["of"]["answer"]
        answer = lenient_text(item["text"])
        asked = judge_request(endpoint.model, question, reference, answer, run.config.judge_decoding)
        return replace(asked, sample=attempt)

    task = Task(request, _read_score, SCORE_FORM, run.config.judge_attempts, name_suffix="#judged")
    return ask_all(run, items, task, endpoint)


def _read_score(reply: Reply, item: Record) -> float:
    try:
        return judge_score(reply)
    except JudgementFailed as error:
        raise UnusableReply("not judged", str(error)) from error
