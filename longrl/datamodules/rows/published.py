"""Row functions of published sets, which take their records as they are released.

Of every row `category` is the set's own main division, and `metadata` has what else the set says: `video_id` (rows on
one video have one), `duration`, `domain`, `task_type`. Videos are found by `find_video`. A record with several
questions gives a row of each, and an error instead of one that cannot be used.

Questions that lack an answer (hidden test splits) or have one outside their options are errors that name record and
field; `data.bad_records: skip` leaves them out, listed and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl.datamodules.rows.media_files import find_video
from longrl.datamodules.rows.question_rows import given_options, question_row, row_or_error
from longrl.datamodules.rows.record_fields import (
    first_field,
    media_field,
    media_fields,
    metadata_field,
    missing_field_error,
    record_id,
    text_field,
)
from longrl.datamodules.rows.sources import Record
from longrl.rewards.options import option_label
from longrl.types import MediaKind, Row

DIRECTION = re.compile(
    r"\n\s*(?:please (?:respond|provide|answer|select|reply)|answer with|respond with only|select the)[^\n]*\s*\Z",
    re.IGNORECASE,
)
"""Last line of a published question that wants the letter and nothing else: `data.question_template` says the form."""
SECONDS = re.compile(r"\d+_\d+_(?:s|m)(?=_)")
"""Length of the videos in a name of LLaVA-Video-178K's parts: `0_30_s_academic_v0_1`, `2_3_m_youtube_v0_1`."""
TEMPLATE_TAG = re.compile(r"[ \t]*<(?:image|video)>[ \t]*\n?")
NEXT_QA_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
"""First letter of NExT-QA's question types: CW, CH, TN, TC, TP, DC, DL, DB, DO."""
CHOOSE_ALL = (
    "Any number of these statements may be right. Answer with the numbers of all that are, in order, as in '1, 3', or "
    "with 'none'."
)
TASKS = (
    "multiple_choice", "math", "numeric", "exact", "temporal_iou", "box_iou", "regression", "mra", "ocr", "free_form",
    "open_ended",
)  # fmt: skip
VIDEO_R1_TASKS = {
    "multiple choice": "multiple_choice", "numerical": "numeric", "regression": "regression", "OCR": "ocr",
    "free-form": "free_form",
}  # fmt: skip
"""`problem_type` of Video-R1 -> the task whose judge is that of its released code."""


# ----------------------------------------------------------------------------------------------------- any benchmark


OTHER_NAMES = {"options": ("choices",), "video": ("video_path", "videos"), "image": ("image_path", "images")}
"""Field of `canonical_row` -> what other sets call it. Left unread, a question would lose its options or its video."""


def canonical_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """`{id, video, question, options, answer, problem_type, subtitles, metadata}`, the form to write one's own set in.

    `video` (or `image`) is a path or a list of them. `options` may be absent or among the question's lines; `answer` is
    a letter, a wording or the index of an option from 0 on. `problem_type` is a `Row.task`, a type of Video-R1 or, for
    anything else, the category; `metadata["category"]` says it otherwise. `subtitles`, a file or the lines themselves,
    is what `data.subtitles.source: record` reads.

    Raises:
        ValueError: a field is missing, or has the name that another set gives it (`choices`, `video_path`).
    """
    for field, others in OTHER_NAMES.items():
        found = next((other for other in others if record.get(other)), None)
        if found and not record.get(field):
            raise missing_field_error(record, index, field, f", but it has {found!r}: rename that")
    kind = str(record.get("problem_type") or "")
    task = kind if kind in TASKS else VIDEO_R1_TASKS.get(kind)
    extra = metadata_field(record, index, media_root, record.get("subtitles"))
    files = {"videos": record.get("video"), "images": record.get("image"), "audios": None}
    fields = {
        "options": record.get("options"),
        "task": task,
        "category": extra.get("category") or (None if task else kind),
        "reasoning": record.get("reasoning"),
        "metadata": extra,
        **media_fields(record | files, index, media_root),
    }
    return question_row(record, index, text_field(record, "question", index), fields)


# ---------------------------------------------------------------------------------------------------------- videos


def video_mme_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of VideoMME (arXiv:2405.21075): four options with letters, three questions on each of 900 videos.

    The category is the length of the video: short, medium or long.
    """
    fields = {
        "id": text_field(record, "question_id", index),
        "task": "multiple_choice",
        "category": text_field(record, "duration", index),
        "metadata": {name: record.get(name) for name in ("duration", "domain", "sub_category", "task_type")},
    }
    return video_row(record, index, media_root, text_field(record, "videoID", index), fields)


def video_r1_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A Video-R1 record (arXiv:2503.21776): `options` apart, `solution` in a tag, `process`, and one `path`."""
    kind: MediaKind = "image" if record.get("data_type") == "image" else "video"
    paths = media_field(record, "path", kind, index, media_root)
    if not paths:
        raise missing_field_error(record, index, "path")
    problem_type = str(record.get("problem_type") or "general")
    fields = {
        "options": record.get("options"),
        "answer": text_field(record, "solution", index),
        "task": VIDEO_R1_TASKS.get(problem_type),
        "category": problem_type,
        "reasoning": record.get("process"),
        f"{kind}s": paths,
    }
    return question_row(record, index, text_field(record, "problem", index), fields)


def llava_video_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """Every question of a conversation of LLaVA-Video-178K (arXiv:2410.02713), with multiple choice, open or captions.

    `<image>` stands for the video there and is left out, as is a last line that asks for the letter alone.
    """
    turns = record.get("conversations") or []
    if not turns or len(turns) % 2:
        raise missing_field_error(record, index, "conversations", ": questions and answers in turn")
    source, video = str(record.get("data_source") or ""), text_field(record, "video", index)
    duration = SECONDS.match(source)

    def row(pair: tuple[Mapping[str, Any], Mapping[str, Any]], position: int) -> Row:
        human, gpt = pair
        if (human.get("from"), gpt.get("from")) != ("human", "gpt"):
            raise ValueError(
                f"record {index}: turn {2 * position} of 'conversations' must be of human, the next of gpt"
            )
        question = DIRECTION.sub("", TEMPLATE_TAG.sub("", text_field(human, "value", index)).rstrip())
        fields = {
            "id": f"{record_id(record, index)}-{position}",
            "question": question.strip(),
            "answer": gpt.get("value"),
            "category": source,
            "metadata": {"duration": duration[0] if duration else None},
        }
        return video_row(record, index, media_root, video, fields)

    return each_row(list(zip(turns[::2], turns[1::2], strict=True)), index, row)


def next_qa_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of NExT-QA (arXiv:2105.08276): options `a0` to `a4`, `answer` the index of the right one; or open."""
    video, kind = text_field(record, "video", index), str(record.get("type") or "")
    options = [record[f"a{n}"] for n in range(5) if record.get(f"a{n}") is not None]
    fields = {
        "id": f"{video}-{record.get('qid', index)}",
        "options": options,
        "answer": option_index(record, "answer", index) if options else record.get("answer"),
        "task": "multiple_choice" if options else "open_ended",
        "category": NEXT_QA_KINDS.get(kind[:1]),
        "metadata": {"task_type": kind or None},
    }
    return video_row(record, index, media_root, video, fields)


def perception_test_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """Multiple choice of the Perception Test (arXiv:2305.13786), released by video (`mc_question`) or by question.

    `answer_id` is the index of the right one of three `options`; the category is the skill area.
    """
    about = record.get("metadata") or {}
    video = str(record.get("video_name") or about.get("video_id") or "")
    if not video:
        raise missing_field_error(record, index, "video_name", ", and so is metadata's 'video_id'")

    def row(item: Mapping[str, Any], position: int) -> Row:
        fields = {
            "id": f"{video}-{first_field(item, 'question_id', 'id', default=position)}",
            "answer": option_index(item, "answer_id", index),
            "task": "multiple_choice",
            "category": item.get("area"),
            "metadata": {"task_type": item.get("reasoning"), "tags": item.get("tag")},
        }
        return video_row(item, index, media_root, video, fields)

    return each_row(record.get("mc_question", [record]), index, row)


def clevrer_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """All questions on a scene of CLEVRER (arXiv:1910.01442); the category is the question's type.

    A descriptive question has a word or a number as its answer, a predictive one is a choice of two. Any number of an
    explanatory or counterfactual one's choices may be right, and the question counts as a whole, as in the paper: the
    answer is the list of their numbers (`CHOOSE_ALL`).
    """
    video = text_field(record, "video_filename", index)
    scene = str(record.get("scene_index", Path(video).stem))

    def row(item: Mapping[str, Any], position: int) -> Row:
        fields = {
            "id": f"{scene}-{item.get('question_id', position)}",
            "category": text_field(item, "question_type", index),
            "metadata": {"task_type": item.get("question_subtype")},
        }
        return video_row(item, index, media_root, video, fields | _clevrer_answer(item, index))

    return each_row(record.get("questions") or [], index, row)


def _clevrer_answer(item: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Answer and task of one of the three forms; of the last also the question."""
    if not item.get("choices"):
        answer = text_field(item, "answer", index)
        return {"answer": answer, "task": "numeric" if answer.isdigit() else "exact"}
    choices = _in_order(item["choices"])
    wordings = [text_field(choice, "choice", index) for choice in choices]
    right = [n for n, choice in enumerate(choices) if text_field(choice, "answer", index) == "correct"]
    if item["question_type"] == "predictive":
        return {"options": wordings, "answer": right[0] if len(right) == 1 else None, "task": "multiple_choice"}
    chosen = [str(n + 1) for n in right]
    aliases = [",".join(chosen), " and ".join(chosen)] if chosen else None
    lines = [f"{n}) {wording}" for n, wording in enumerate(wordings, start=1)]
    return {
        "question": "\n".join([text_field(item, "question", index), *lines, CHOOSE_ALL]),
        "answer": ", ".join(chosen) or "none",
        "task": "exact",
        "metadata": {"task_type": item.get("question_subtype"), "aliases": aliases},
    }


def _in_order(choices: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(choices, key=lambda choice: choice.get("choice_id", 0))


def star_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of STAR (arXiv:2405.09711) on a situation; of the video only `start` to `end` (seconds) is read.

    `answer` is the wording of one of the `choices`; the category is the kind that `question_id` begins with:
    Interaction, Sequence, Prediction or Feasibility.
    """
    name = text_field(record, "question_id", index)
    fields = {
        "id": name,
        "options": [text_field(choice, "choice", index) for choice in _in_order(record.get("choices") or [])],
        "task": "multiple_choice",
        "category": name.partition("_")[0],
        "metadata": {"span_s": shown_span(record, index)},
    }
    return video_row(record, index, media_root, text_field(record, "video_id", index), fields)


# --------------------------------------------------------------------------------------------------------- the parts


def video_row(
    record: Mapping[str, Any], index: int, media_root: str | None, video: str, fields: Mapping[str, Any]
) -> Row:
    """The row of a question on one video; question and options are the record's unless `fields` has others."""
    known: dict[str, Any] = {"options": record.get("options"), "videos": (find_video(video, media_root),), **fields}
    known["metadata"] = {"video_id": Path(video).stem} | known["metadata"]
    question = known.pop("question", None) or text_field(record, "question", index)
    return question_row(record, index, question, known)


def each_row(items: Sequence[Any], index: int, row: Callable[[Any, int], Row]) -> list[Row | ValueError]:
    """A row of each item of a record, from the item and its place; what is wrong with one takes its place."""

    def at(place: int) -> Callable[[Any, int], Row]:
        return lambda item, _: row(item, place)

    return [row_or_error(at(place), item, index) for place, item in enumerate(items)]


def option_index(record: Mapping[str, Any], field: str, index: int) -> int:
    """Which option is right, counted from 0; tables have it as text, or as 2.0 where the column has gaps."""
    value = text_field(record, field, index)
    place = _number(value)
    if not place.is_integer():
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): {field!r} must be the place of an option, counted from "
            f"0, got {value!r}; correct it, or choose the row function of its schema with data.row_function"
        )
    return int(place)


def shown_span(record: Mapping[str, Any], index: int) -> list[float]:
    """`start` and `end`, the seconds of the video that are asked about.

    Raises:
        ValueError: one is missing or no number, or the end is no later than the start.
    """
    start, end = (_number(text_field(record, name, index)) for name in ("start", "end"))
    if not 0 <= start < end < float("inf"):
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): 'start' must lie before 'end', got {record['start']!r} "
            f"and {record['end']!r} s; correct it"
        )
    return [start, end]


def options_by_letter(options: Any, record: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Options that a record has by letter, in the order of the letters, without empty ones behind the last.

    Raises:
        ValueError: letters leave one out or an option before the last is empty, so that nobody knows what the letters
            behind it mean.
    """
    if not isinstance(options, Mapping):
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): options must be by letter, got {options!r:.100}"
        )
    letters = sorted(options)
    wordings = given_options(
        [None if options.get(letter) == "" else options.get(letter) for letter in letters], record, index
    )
    letters = letters[: len(wordings)]
    if letters != [option_label(place) for place in range(len(letters))]:
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): options must be lettered from A on without a gap, got "
            f"{', '.join(letters)}; correct it"
        )
    return dict(zip(letters, wordings, strict=True))


def _number(text: str) -> float:
    """A text as a number, NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
