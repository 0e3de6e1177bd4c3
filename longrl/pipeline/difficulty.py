"""Step filter: what a policy can answer always, never, or without the video, teaches nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from longrl.chat.client import ReplyCache
from longrl.chat.endpoint import Reply, Request
from longrl.datamodules.loading.render import DEFAULT_QUESTION, fill_template
from longrl.pipeline.asking import Task, Unusable, ask_all
from longrl.pipeline.config import FilterOptions, PipelineConfig
from longrl.pipeline.video_frames import FrameSet, frame_times, middles
from longrl.pipeline.workspace import Record, Report, Workspace
from longrl.rewards.answer_text import lenient_text
from longrl.rewards.choice import chosen_option
from longrl.rewards.judge import JudgementFailed, judge_request, judge_score, shared_words

LETTERS = "ABCDEFGH"


def filter_questions(
    config: PipelineConfig, workspace: Workspace, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> None:
    """Writes the questions that stay, with how often each was answered right, and the dropped ones beside them."""
    records, options = workspace.read("rewrite"), config.filter
    scores = _scores(records, config, workspace, replies, report, advance) if options.num_samples else {}
    kept, dropped = [], []
    for record in records:
        seen, blind = scores.get((record["id"], False), []), scores.get((record["id"], True), [])
        graded = {**record, "seen": _tally(seen), "blind": _tally(blind)}
        why = reason_to_drop(seen, blind, options)
        report.counts[why or "kept"] += 1
        (dropped if why else kept).append({**graded, "dropped": why} if why else graded)
    if not options.num_samples:
        report.items = report.done = len(records)
    workspace.write("filter", kept)
    workspace.write_beside("filter", "dropped", dropped)


def reason_to_drop(seen: Sequence[float | None], blind: Sequence[float | None], options: FilterOptions) -> str | None:
    """Why a question goes; None if it stays.

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


# ------------------------------------------------------------------------------------------------------------- asking


def rotated(options: Sequence[str], turns: int) -> list[str]:
    """Options in another order: over all turns each stands everywhere, so that a love of letters tells nothing."""
    turns %= max(1, len(options))
    return [*options[turns:], *options[:turns]]


def with_options(question: str, options: Sequence[str]) -> str:
    """The problem as a model reads it."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))])


def _scores(
    records: Sequence[Record],
    config: PipelineConfig,
    workspace: Workspace,
    replies: ReplyCache,
    report: Report,
    advance: Callable[[int], Any],
) -> dict[tuple[str, bool], list[float | None]]:
    """(question id, blind) -> score of each of the policy's answers."""
    options = config.filter
    counts = ((False, options.num_samples), (True, options.blind_samples))
    items = [
        {"id": f"{record['id']}#{'blind' if blind else 'seen'}{n}", "of": record, "blind": blind, "n": n}
        for record in records
        for blind, count in counts
        for n in range(count)
    ]
    texts = _answers(items, config, workspace, replies, report, advance)
    answered = [{**item, "text": text} for item, text in zip(items, texts, strict=True) if text is not None]
    to_judge = [item for item in answered if item["of"]["kind"] == "open_ended" and lenient_text(item["text"])]
    judgements = _judged(to_judge, config, replies, report, advance)
    judged = {item["id"]: score for item, score in zip(to_judge, judgements, strict=True)}
    scores: dict[tuple[str, bool], list[float | None]] = {}
    for item in answered:
        score = judged[item["id"]] if item["id"] in judged else _choice_score(item)
        scores.setdefault((item["of"]["id"], item["blind"]), []).append(score)
    return scores


def _answers(
    items: Sequence[Record],
    config: PipelineConfig,
    workspace: Workspace,
    replies: ReplyCache,
    report: Report,
    advance: Callable[[int], Any],
) -> list[str | None]:
    endpoint, options = config.endpoint("policy"), config.filter
    videos = {video["video"]: video for video in workspace.read("timeline")}

    def request(item: Record, attempt: int) -> Request:
        record = item["of"]
        problem = with_options(record["question"], rotated(record["options"], item["n"]))
        text = fill_template(DEFAULT_QUESTION, problem=problem, subtitles="")
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        frames = None if item["blind"] else video_frames(videos[record["video"]], options)
        if frames is not None:
            content = [*frames.parts(), *content]
        load = frames.load if frames is not None else None
        messages = ({"role": "user", "content": content if frames else content[0]["text"]},)
        return Request(endpoint.model, messages, options.decoding, item["n"], endpoint.extra, load)

    advance(len(items))
    task = Task(lambda item: str(item["id"]), request, _said)
    return ask_all(items, task, endpoint, replies, report, lambda: advance(0))


def video_frames(video: Record, options: FilterOptions) -> FrameSet:
    """Frames spread over a whole video."""
    times = frame_times(video["path"])
    indices = middles(times, 0, len(times.pts), options.num_frames)
    return FrameSet(video["path"], video["digest"], tuple(indices), options.max_side)


def _said(reply: Reply, item: Record) -> str:
    """Whatever the policy says: nothing, or a refusal, is a wrong answer."""
    return reply.text


def _choice_score(item: Record) -> float:
    """1.0 for the right option; an open-ended question without an answer has none either."""
    listed = rotated(item["of"]["options"], item["n"])
    chosen = chosen_option(lenient_text(item["text"]), dict(zip(LETTERS, listed, strict=False)))
    return float(chosen is not None and listed[LETTERS.index(chosen)] == item["of"]["answer"])


def _judged(
    items: Sequence[Record], config: PipelineConfig, replies: ReplyCache, report: Report, advance: Callable[[int], Any]
) -> list[float | None]:
    """Scores of open-ended answers; an answer that is equal to another one's is judged once."""
    if config.filter.open_ended == "text_similarity":
        return [shared_words(lenient_text(item["text"]), item["of"]["answer"]) for item in items]
    if not items:
        return []
    endpoint = config.endpoint("judge")

    def request(item: Record, attempt: int) -> Request:
        question, reference = item["of"]["question"], item["of"]["answer"]
        answer = lenient_text(item["text"])
        return judge_request(endpoint.model, question, reference, answer, config.judge_decoding)

    advance(len(items))
    task = Task(lambda item: f"{item['id']}#judged", request, _score)
    return ask_all(items, task, endpoint, replies, report, lambda: advance(0))


def _score(reply: Reply, item: Record) -> float:
    try:
        return judge_score(reply)
    except JudgementFailed as error:
        raise Unusable("not judged", str(error)) from error
