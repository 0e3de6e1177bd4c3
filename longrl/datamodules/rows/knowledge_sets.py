"""Row functions of benchmarks of what a lecture or an expert's video teaches: VideoMMMU and MMVU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from longrl.datamodules.rows.published import each_row, options_by_letter, video_row
from longrl.datamodules.rows.question_rows import (
    given_options,
    lettered_options,
    media_field,
    missing_field_error,
    question_row,
    text_field,
)
from longrl.datamodules.rows.sources import NAME_FIELD, Record
from longrl.rewards.numeric import number
from longrl.types import Row

Track = Literal["perception", "comprehension", "adaptation", "question only"]
TRACKS: tuple[Track, ...] = ("perception", "comprehension", "adaptation")
DISCIPLINES = {
    "Art": ("Art", "Art_Theory", "Design", "Music"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Humanities": ("History", "Literature", "Sociology", "Psychology"),
    "Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
    "Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
}  # fmt: skip
"""Disciplines of VideoMMMU and their subjects, which its ids name: `dev_Art_Theory_3`."""
APPLY = "You should watch and learn the video content. Then apply what you learned to "
AT_THE_END = "The image for this question is at the end of the video.\n"
ADAPTATION_ASKS = {
    True: f"{APPLY}answer the following multi-choice question. {AT_THE_END}",
    False: f"{APPLY}answer the following open-ended question. {AT_THE_END}",
}
"""What lmms-eval, with which VideoMMMU was published, says before a question with options, and before an open one."""
IGNORE_QUIZ = "\nPlease ignore the Quiz question in last frame of the video."
IMAGE_FIELDS = ("image 1", "image_1", "image")
LISTED = re.compile(r"'([^']+)'|'([^',\]]+)")
"""Texts in a list; a quotation mark at the end may be missing."""
HUB_FILE = re.compile(r"https?://\S+/resolve/[^/]+/(\S+)")
MMVU_DISCIPLINES = {
    "Science": (
        "Astronomy", "Biology", "Chemistry", "Electromagnetism", "Geography", "Materials Science", "Mechanics",
        "Modern Physics", "Neurobiology", "Thermodynamics",
    ),
    "Healthcare": ("Basic Medicine", "Clinical Medicine", "Dentistry", "Pharmacy", "Preventive Medicine"),
    "Humanities & Social Sciences": ("Art", "Economics", "History", "Law", "Literature", "Management"),
    "Engineering": (
        "Biomedical Engineering", "Civil Engineering", "Computer Science", "Electrical Engineering",
        "Electronics and Communication", "Mechanical Engineering",
    ),
}  # fmt: skip
MMVU_ASKS = {
    True: (
        "Answer the given multiple-choice question step by step. Begin by explaining your reasoning process clearly. "
        "Conclude by stating the final answer using the following format: 'Therefore, the final answer is: $LETTER' "
        "(without quotes), where $LETTER is one of the options. Think step by\nstep before answering."
    ),
    False: (
        "Answer the given question step by step. Begin by explaining your reasoning process clearly. Conclude by "
        "stating the final answer using the following format: 'Therefore, the final answer is: 'Answer: $ANSWER' "
        "(without quotes), where $ANSWER is the final answer of the question. Think step by step\nbefore answering."
    ),
}
"""What MMVU's authors want of a question with options, and of an open one (`utils/constant.py`, with reasoning)."""


# --------------------------------------------------------------------------------------------------------- VideoMMMU


def video_mmmu_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """All questions of a file of VideoMMMU (arXiv:2501.13826), whose one record is a track with questions by number."""
    name = str(record.get(NAME_FIELD) or "").lower()
    track = next((one for one in TRACKS if one == name), None)
    if track is None:
        raise ValueError(
            f"record {index} must be a track of VideoMMMU, {', '.join(TRACKS)}, with its questions by number, got "
            f"{name!r}; of a hub id set data.row_function to video_mmmu_{{track}}_row"
        )
    return each_row(_questions(record), index, lambda item, _: _video_mmmu_row(item, index, media_root, track))


def video_mmmu_perception_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of VideoMMMU's first track, on what is seen or said."""
    return _video_mmmu_row(record, index, media_root, "perception")


def video_mmmu_comprehension_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of its second track, on what that means."""
    return _video_mmmu_row(record, index, media_root, "comprehension")


def video_mmmu_adaptation_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of its third track: the problem of an exam, whose image is the video's last frame."""
    return _video_mmmu_row(record, index, media_root, "adaptation")


def video_mmmu_gain_rows(record: Record, index: int, media_root: str | None = None) -> list[Row | ValueError]:
    """Questions of the third track twice, with their video and with their image alone: what the video teaches.

    The image is the record's (`image 1`), else the video `question_only/ID_image.mp4`, which shows nothing else. The
    record is a question, or as in the file the whole track.
    """
    tracks: tuple[Track, ...] = ("adaptation", "question only")
    asked = [(item, track) for item in _questions(record) for track in tracks]
    return each_row(asked, index, lambda pair, _: _video_mmmu_row(pair[0], index, media_root, pair[1]))


def _questions(record: Record) -> list[Record]:
    """The questions of a track by number; a record that is one question is that."""
    if NAME_FIELD not in record:
        return [record]
    return [item for name, item in record.items() if name != NAME_FIELD]


def _video_mmmu_row(record: Mapping[str, Any], index: int, media_root: str | None, track: Track) -> Row:
    name, question = text_field(record, "id", index), text_field(record, "question", index)
    subject = "_".join(name.split("_")[1:-1])
    discipline = next((group for group, subjects in DISCIPLINES.items() if subject in subjects), "other")
    options = given_options(record.get("options") or (), record, index)
    asked = "\n".join([question, *lettered_options(options)])
    if track == "adaptation":
        asked = ADAPTATION_ASKS[bool(options)] + asked
    elif track == "question only":
        asked += "" if options else "\n"
    else:
        asked += IGNORE_QUIZ
    answers = _accepted(text_field(record, "answer", index))
    is_number = len(answers) == 1 and number(answers[0]) is not None
    task = "multiple_choice" if options else "numeric" if is_number else "exact"
    fields: dict[str, Any] = {
        "id": f"{name}/{track}",
        "options": options or None,
        "answer": answers[0],
        "task": task,
        "category": track,
        "metadata": {
            "video_id": name,
            "discipline": discipline,
            "subject": subject,
            "asked": asked,
            "aliases": answers[1:] or None,
        },
    }
    if track != "question only":
        return video_row(record, index, media_root, name, fields)
    image = next((field for field in IMAGE_FIELDS if record.get(field) is not None), None)
    if image is None:
        return video_row(record, index, media_root, f"question_only/{name}_image.mp4", fields)
    fields["images"] = media_field(record, image, "image", index, media_root)
    return question_row(record, index, question, fields)


def _accepted(answer: str) -> list[str]:
    """The answers that are accepted: one, or those of a list in its text, "['24/7', '3.43']"."""
    quoted = LISTED.findall(answer) if answer.startswith("[") else []
    return [closed or open_ended for closed, open_ended in quoted] or [answer]


# -------------------------------------------------------------------------------------------------------------- MMVU


def mmvu_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of MMVU (arXiv:2501.12380): `choices` by letter, empty ones where the question is open.

    The category is the discipline of its subject. Of the video's address the part behind the repository is its path
    under `media_root`; lmms-eval's records have it as `video_path`.
    """
    question = text_field(record, "question", index)
    about = record.get("metadata") or {}
    video = str(record.get("video_path") or text_field(record, "video", index))
    address = HUB_FILE.fullmatch(video)
    path = address[1] if address else video
    is_choice = record.get("question_type") == "multiple-choice"
    choices = options_by_letter(record.get("choices") or {}, record, index) if is_choice else {}
    if is_choice and not choices:
        raise missing_field_error(record, index, "choices")
    folder = path.rpartition("/")[0].rpartition("/")[2]
    subject = str(about.get("subject") or folder.replace("_", " "))
    lines = [f"{label}: {text}" for label, text in choices.items()]
    fields = {
        "options": list(choices.values()) if is_choice else None,
        "answer": text_field(record, "answer", index),
        "task": "multiple_choice" if is_choice else "open_ended",
        "category": next((name for name, subjects in MMVU_DISCIPLINES.items() if subject in subjects), "other"),
        "metadata": {
            "video_id": path.removesuffix(".mp4"),
            "subject": subject,
            "kind": str(record.get("question_type")),
            "asked": "\n".join([f"Question: {question}", *lines]),
            "instruction": MMVU_ASKS[is_choice],
            "asked_of_judge": "\n".join([question, "", "Options:", *lines]) if is_choice else question,
        },
    }
    return video_row(record, index, media_root, path, fields)
