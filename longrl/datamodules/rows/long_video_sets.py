"""Row functions of benchmarks of long videos: LVBench, MLVU, LongVideoBench and Video-MME-v2.

They take records as they are released, and what `longrl.datamodules.rows.published` says of metadata holds for them;
docs/benchmarks.md has what was read to find each format. Functions whose names end in `hidden_row` are for splits whose
answers only a server knows: their rows are asked and never scored (`protocol.submission`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from longrl.datamodules.rows.published import each_row, video_row
from longrl.datamodules.rows.question_rows import (
    first_field,
    given_options,
    is_null,
    missing_field_error,
    record_id,
    text_field,
)
from longrl.datamodules.rows.sources import Record
from longrl.rewards.options import option_label
from longrl.types import Row

HIDDEN = {"answer": "hidden", "task": "open_ended"}
"""Fields of a row that nobody here can score: no answer that could be taken for right."""
HIDDEN_MARK = {"hidden_answer": True}
MLVU_FOLDERS = {
    "plotQA": "1_plotQA", "findNeedle": "2_needle", "needle": "2_needle", "ego": "3_ego", "count": "4_count",
    "order": "5_order", "anomaly_reco": "6_anomaly_reco", "topic_reasoning": "7_topic_reasoning",
    "subPlot": "8_sub_scene", "summary": "9_summary",
}  # fmt: skip
"""Task of MLVU's development set -> the folder of its videos: one name may stand in several."""
MLVU_OPEN = ("subPlot", "summary")
LONG_VIDEO_BENCH_OPTIONS = tuple(f"option{number}" for number in range(5))


def bracketed(wordings: Sequence[Any]) -> list[str]:
    """Options as "(A) wording", the way several benchmarks write them."""
    return [f"({option_label(index)}) {wording}" for index, wording in enumerate(wordings)]


def asked_with_options(question: str, wordings: Sequence[Any]) -> str:
    """A question as MVBench words it, and MLVU after it: `{asked}` of `data.question_template`."""
    return "\n".join([f"Question: {question}", "Options:", *bracketed(wordings)])


# -------------------------------------------------------------------------------------------------------------- LVBench


def lvbench_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """All questions on a video of LVBench (arXiv:2406.08035), as `video_info.meta.jsonl` has them under `qa`; or one.

    A question's text has its options, "(A) ..". The category is the kind of video (`type`: cartoon, sport, ..).
    `question_type` has one or several of the six abilities; the question counts in each
    (`breakdowns: [question_type]`). The video is named by its YouTube id, `key`, or by `video_path`.
    """
    items = record.get("qa")
    video = first_field(record, "video_path", "key", "video_id")
    if video is None:
        raise missing_field_error(record, index, "key", ", and so is 'video_path'")

    def row(item: Mapping[str, Any], position: int) -> Row:
        kinds, options = item.get("question_type") or [], item.get("options")
        about = {name: item.get(name) for name in ("time_reference",)}
        fields = {
            "id": str(first_field(item, "uid", "question_id", "id", default=f"{video}-{position}")),
            "options": None if options is None else bracketed(given_options(options, item, index)),
            "task": "multiple_choice",
            "category": first_field(item, "type", default=record.get("type")),
            "metadata": about | {"question_type": [kinds] if isinstance(kinds, str) else list(kinds)},
        }
        return video_row(item, index, media_root, str(video), fields)

    return each_row([record] if items is None else items, index, row)


# ----------------------------------------------------------------------------------------------------------------- MLVU


def mlvu_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of MLVU (arXiv:2406.04264), of the development set's files (`1_plotQA.json` ..) or of the test set.

    Multiple choice has `candidates`, `answer` being one of them; scenes (`subPlot`) and summaries (`summary`) are told
    in one's own words, which a judge must score (`free_form`). The category is the task, over which M-Avg and G-Avg
    are means. Of the development set's videos those in the task's own folder are taken.
    """
    kind = text_field(record, "question_type", index)
    if kind in MLVU_OPEN:
        fields: dict[str, Any] = {"answer": _told(record, index), "options": None, "task": "free_form"}
    else:
        fields = {**candidates_choice(record, index), "task": "multiple_choice"}
    return _mlvu(record, index, media_root, fields, {})


def mlvu_hidden_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of MLVU's test set before its answers were released (`test_question.json`)."""
    fields = HIDDEN | {"options": given_options(record.get("candidates") or (), record, index)}
    return _mlvu(record, index, media_root, fields, HIDDEN_MARK)


def _mlvu(
    record: Record, index: int, media_root: str | None, fields: Mapping[str, Any], mark: Mapping[str, Any]
) -> Row:
    kind, video = text_field(record, "question_type", index), text_field(record, "video", index)
    in_task = os.path.join(MLVU_FOLDERS.get(kind, kind), video)
    path = in_task if os.path.isfile(os.path.join(os.path.expanduser(media_root or ""), in_task)) else video
    question = text_field(record, "question", index)
    options = fields["options"]
    asked = None if options is None else asked_with_options(question, options)
    known = {
        "id": str(first_field(record, "question_id", default=f"{kind}-{index}")),
        "question": question,
        "category": kind,
        "metadata": {"duration": record.get("duration"), "asked": asked, **mark},
    }
    return video_row(record, index, media_root, path, known | dict(fields))


def candidates_choice(record: Record, index: int) -> dict[str, Any]:
    """`candidates` as options and the number of the right one; the answer is a wording, or a letter."""
    wordings = given_options(record.get("candidates") or (), record, index)
    if not wordings:
        raise missing_field_error(record, index, "candidates")
    answer = text_field(record, "answer", index)
    known = [str(wording).strip() for wording in wordings]
    return {"options": wordings, "answer": known.index(answer) if answer in known else answer}


def _told(record: Record, index: int) -> str:
    """What a judge compares with: the points that a scene is scored by, or the summary."""
    points = record.get("scoring_points")
    if points:
        listed = [points] if isinstance(points, str) else [point for point in points if not is_null(point)]
        return "\n".join(f"- {point}" for point in listed)
    return text_field(record, "answer", index)


# ------------------------------------------------------------------------------------------------------- LongVideoBench


def longvideobench_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of LongVideoBench (arXiv:2407.15754): `lvb_val.json`, or the hub's table with `option0` to `option4`.

    `correct_choice` is the index of one of the `candidates`. The category is `question_category` (S2E, T3O, ..); the
    metadata has `duration_group` (15, 60, 600, 3600), `topic_category`, and the subtitles, whose times begin
    `starting_timestamp_for_subtitles` before the video: `data.subtitles.source: record` reads them. Videos lie in
    `videos/`, subtitles in `subtitles/` of the media root, as they unpack.
    """
    choice = record.get("correct_choice")
    is_known = isinstance(choice, int | float) and not isinstance(choice, bool) and choice >= 0
    if not is_known:
        raise missing_field_error(record, index, "correct_choice", "; longvideobench_hidden_row reads hidden splits")
    fields = {"options": _candidates(record, index), "answer": choice, "task": "multiple_choice"}
    return _longvideobench(record, index, media_root, fields, {})


def longvideobench_hidden_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of LongVideoBench's test split (`lvb_test_wo_gt.json`), whose answers its leaderboard knows."""
    return _longvideobench(record, index, media_root, HIDDEN | {"options": _candidates(record, index)}, HIDDEN_MARK)


def _candidates(record: Record, index: int) -> list[Any]:
    columns = [record.get(name) for name in LONG_VIDEO_BENCH_OPTIONS]
    candidates = record.get("candidates")
    listed = columns if candidates is None or not len(candidates) else candidates
    options = given_options([None if option in ("", "N/A") else option for option in listed], record, index)
    if not options:
        raise missing_field_error(record, index, "candidates", ", and so are 'option0' to 'option4'")
    return options


def _longvideobench(
    record: Record, index: int, media_root: str | None, fields: Mapping[str, Any], mark: Mapping[str, Any]
) -> Row:
    from longrl.datamodules.media.subtitles import subtitles_below

    video, subtitles = text_field(record, "video_path", index), record.get("subtitle_path")
    names = ("duration", "duration_group", "topic_category")
    about = {name: record.get(name) for name in names} | {"video_id": record.get("video_id"), **mark}
    if subtitles:
        about["subtitles"] = subtitles_below(os.path.join("subtitles", str(subtitles)), media_root)
        about["subtitles_from_s"] = record.get("starting_timestamp_for_subtitles") or 0.0
    known = {"id": record_id(record, index), "category": record.get("question_category"), "metadata": about}
    return video_row(record, index, media_root, os.path.join("videos", video), {**known, **fields})


# --------------------------------------------------------------------------------------------------------- Video-MME-v2


def video_mme_v2_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of Video-MME-v2 (arXiv:2604.05015): eight options in one text, four questions on each of 800 videos.

    The four are a group that is scored as a whole (`protocol.groups`): the metadata has `group`, `group_type`
    (`relevance` or `logic`), `group_structure`, and at least of the last question `level`, `second_head` and
    `third_head`. The category is the type of its group. Videos lie in `video/`, their words with times in `subtitle/`.
    """
    from longrl.datamodules.media.subtitles import subtitles_below

    video = text_field(record, "video_id", index)
    given = record.get("options")
    listed = None if isinstance(given, str) else given or ()
    question = text_field(record, "question", index)
    names = ("group_type", "group_structure", "level", "second_head", "third_head")
    known = {name: record.get(name) for name in names}
    known = {name: None if value in ("", "None") else value for name, value in known.items()}
    if isinstance(known["level"], float) and known["level"] == known["level"]:  # a column with gaps
        known["level"] = int(known["level"])
    fields = {
        "id": text_field(record, "question_id", index),
        "question": f"{question}\n{given.strip()}" if isinstance(given, str) else question,
        "options": listed,
        "task": "multiple_choice",
        "category": text_field(record, "group_type", index),
        "metadata": {
            "video_id": video,
            "group": video,
            "subtitles": subtitles_below(os.path.join("subtitle", f"{video}.jsonl"), media_root),
            **known,
        },
    }
    return video_row(record, index, media_root, os.path.join("video", f"{video}.mp4"), fields)
