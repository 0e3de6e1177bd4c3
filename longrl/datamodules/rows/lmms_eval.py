"""Documents of lmms-eval tasks as rows, whatever their fields are called: nothing here knows a task by its name.

docs/benchmarks.md says which tasks' documents fit, and why the others do not.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from longrl.datamodules.rows.grounding_sets import when_fields
from longrl.datamodules.rows.media_files import find_video
from longrl.datamodules.rows.question_rows import (
    first_field,
    is_null,
    media_field,
    missing_field_error,
    question_row,
    row_or_error,
)
from longrl.datamodules.rows.record_media import PICTURE_SUFFIXES
from longrl.datamodules.rows.sources import Record
from longrl.rewards.options import option_label, parse_options
from longrl.types import Row

NESTED = ("questions", "qas", "qa_pairs", "qa", "mc_question")
"""Fields with the questions of a document, a list or one; each is read with the document's other fields."""
QUESTIONS = ("question", "problem", "q", "query", "input", "user_prompt", "question_1", "question_2")
SENTENCES = ("query", "caption")
SPANS = ("span", "timestamp")
"""When a sentence happens: [start, end] in seconds, or a list of one, where there is no other answer."""
OPTIONS = ("options", "choices", "candidates", "option", "index2ans")
ANSWERS_AS_OPTIONS = "answers"
"""Options beside a `correct_answer`; by itself a list of what is accepted."""
COLUMNS = (
    [f"a{n}" for n in range(10)],
    [f"option{n}" for n in range(10)],
    list("ABCDEFGH"),
    [f"option_{n}" for n in range(10)],
    [f"answer_choice_{n}" for n in range(10)],
    [f"choice_{letter}" for letter in "abcdefgh"],
)
WORDINGS = ("text", "choice", "option", "content")
"""What the wording of an option that is a mapping is called."""
ANSWERS = (
    "answer", "correct_choice", "answer_number", "answer_id", "correct_answer", "right_answer", "correct_answer_label",
    "correct_option_letter", "ground_truth", "gt_option_idx", "answer_index", "gt_answer", "gt", "answer_text",
    "reference_answer",
)  # fmt: skip
VIDEOS = (
    "video", "video_path", "video_name", "videoid", "video_id", "video_idx", "video_uid", "path", "file_name",
    "video_list", "input_file", "visual", "audio_visual_path", "visual_path", "scene_name", "scene_id", "clip",
)  # fmt: skip
IMAGES = ("image", "images", "ref_images", "image_path")
SOUNDS = "audio_path"
CATEGORIES = ("category", "problem_type", "task_type", "question_category", "question_type", "type")
KEPT = ("duration", "domain", "task_type")
"""Fields that rows keep as metadata; another one would give stored answers another name."""
MAX_LITERAL = 20_000
"""Characters of a list or mapping that is written as text."""


def lmms_eval_row(record: Record, index: int, media_root: str | None = None) -> Row | list[Row | ValueError]:
    """A document of an lmms-eval task, or a line of its sample logs, whose document is in `doc`.

    Documents differ by task. Of each of these the first name that is there and not null counts, whether it is written
    with capitals, spaces or underscores:

    - question: `QUESTIONS`; several in a field of `NESTED` give a row each, "None" is none;
    - options: `OPTIONS`, a list, a mapping by letter, a list of mappings, or any of these as text, also one per line;
      or columns (`COLUMNS`: `a0`.., `option0`.., `A`..), with "N/A" or nothing behind the last;
    - answer: `ANSWERS`, of which with options the first that means one: a letter, a wording, or as a number an index
      from 0 on; without options a text, a number, or a list of what is accepted;
    - a sentence (`SENTENCES`) with when it happens (`SPANS`), and nothing else to answer, is temporal grounding;
    - video: `VIDEOS`, a path, an id, or a list of them; images where there is no video, or the question places them;
      sounds where there is a list of them;
    - category: `CATEGORIES`; `Start` and `End`, written so (LEMONADE), are the seconds that are asked about. Those of
      MVBench, in small letters, lmms-eval does not read either.
    """
    doc = record["doc"] if isinstance(record.get("doc"), Mapping) else record
    name = next((name for name in NESTED if isinstance(doc.get(name), (list, tuple, Mapping)) and doc[name]), None)
    if name is None:
        return _row(doc, record, index, media_root)
    items = [doc[name]] if isinstance(doc[name], Mapping) else doc[name]
    rest = {key: value for key, value in doc.items() if key != name}
    return [
        row_or_error(_row, {"id": f"{index}-{number}", **rest, **item}, {}, index, media_root)
        if isinstance(item, Mapping)
        else ValueError(f"record {index}: {name!r} must hold questions, got {item!r:.60}")
        for number, item in enumerate(items)
    ]


def _row(doc: Mapping[str, Any], record: Record, index: int, media_root: str | None) -> Row:
    named = {**doc, "id": first_field(doc, "question_id", "id", "qid", "doc_id", default=record.get("doc_id", index))}
    spelled = {_spelling(name): value for name, value in doc.items()} | dict(doc)
    media, video = _media(spelled, named, index, media_root)
    span = _span(spelled)
    fields: dict[str, Any] = {
        "category": first_field(spelled, *CATEGORIES),
        "metadata": {
            "video_id": first_field(spelled, "videoid", "video_id", default=Path(video).stem),
            **{name: doc[name] for name in KEPT if name in doc},
            **_shown_part(doc),
        },
        **media,
    }
    if span is not None:
        sentence = str(first_field(spelled, *SENTENCES))
        fields |= when_fields(sentence, *span)
        return question_row(named, index, fields.pop("question"), fields)
    question = next((text for name in QUESTIONS if (text := _text(spelled.get(name)))), "")
    if not question:
        raise missing_field_error(named, index, "question", f", and so are {', '.join(QUESTIONS[1:])}")
    options = _options(doc, spelled)
    fields |= {"options": options, **_answer(spelled, question, options)}
    return question_row(named, index, question, fields)


def _spelling(name: str) -> str:
    return name.strip().lower().replace(" ", "_")


def _text(value: Any) -> str:
    """A field as text; "" where it says nothing."""
    return "" if is_null(value) or isinstance(value, (Mapping, list)) or str(value) == "None" else str(value).strip()


def _read(value: Any) -> Any:
    """What a text that spells a list or a mapping holds; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{") or len(value) > MAX_LITERAL:
        return value
    for read in (json.loads, ast.literal_eval):  # as JSON has it, or Python
        try:
            return read(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return value


# ---- options ----


def _options(doc: Mapping[str, Any], spelled: Mapping[str, Any]) -> list[Any]:
    """Wordings of the options, [] without any; places behind the last may be None."""
    names = (*OPTIONS, ANSWERS_AS_OPTIONS) if not is_null(spelled.get("correct_answer")) else OPTIONS
    for name in names:
        given = _read(spelled.get(name))
        if isinstance(given, str):
            given = parse_options(f"?\n{given}")
        if isinstance(given, Mapping):
            given = [given[key] for key in sorted(given)]
        if isinstance(given, Sequence) and not isinstance(given, str) and len(given):
            wordings = [_wording(each) for each in given]
            if any(wording is not None for wording in wordings):
                return wordings
    for columns in COLUMNS:
        wordings = [_wording(doc.get(name)) for name in columns]
        if sum(wording is not None for wording in wordings) > 1:
            return wordings
    return []


def _wording(option: Any) -> Any:
    if isinstance(option, Mapping):
        option = first_field(option, *WORDINGS)
    return None if is_null(option) or option in ("", "N/A") else option


# ---- answers ----


def _answer(spelled: Mapping[str, Any], question: str, options: Sequence[Any]) -> dict[str, Any]:
    """The answer and, of yes and no, what kind of answer that is."""
    given = [_first(_read(spelled[name])) for name in ANSWERS if not is_null(spelled.get(name))]
    if _text(spelled.get("q")) == question and not is_null(spelled.get("a")):
        given.append(spelled["a"])  # Q and A
    given = [one for one in given if one is not None]
    if not given:
        return {"answer": None}
    wordings = [str(option).strip() for option in options if option is not None]
    if wordings:
        meant = next((place for one in given if (place := _option_meant(one, wordings)) is not None), None)
        return {"answer": given[0] if meant is None else meant}
    says_so = str(given[0]).strip().rstrip(".").lower() in ("yes", "no") and not parse_options(question)
    return {"answer": given[0], "task": "exact"} if says_so else {"answer": given[0]}


def _first(answer: Any) -> Any:
    """Of a list of what is accepted the first; None of an answer that is no text and no number."""
    if isinstance(answer, (list, tuple)):
        answer = answer[0] if answer else None
    return None if isinstance(answer, (list, tuple, Mapping)) else answer


def _option_meant(answer: Any, wordings: Sequence[str]) -> int | None:
    """Place of the option that an answer means, counted from 0; None where it means none."""
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(wordings) else None
    text = str(answer).strip()
    letters = [option_label(place) for place in range(len(wordings))]
    bare = [wording.removeprefix(f"{letter}.").strip() for letter, wording in zip(letters, wordings, strict=True)]
    # 1. A letter, "(B)" or "B."; then a wording, with its letter or without; then a small letter.
    letter = text.strip("() ").rstrip(".):").strip()
    if letter in letters:
        return letters.index(letter)
    for place, (label, wording) in enumerate(zip(letters, bare, strict=True)):
        labelled = (f"{label}. {wording}", f"({label}) {wording}", f"{label}) {wording}", f"{label}: {wording}")
        if _plain(text) in map(_plain, (wording, wordings[place], *labelled)):
            return place
    if letter.upper() in letters:
        return letters.index(letter.upper())
    # 2. The number of an option, as tables have it.
    return int(text) if text.isdecimal() and int(text) < len(wordings) else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _span(spelled: Mapping[str, Any]) -> tuple[float, float] | None:
    """When the sentence of a document happens; None where something else is asked."""
    if any(not is_null(spelled.get(name)) for name in (*ANSWERS, "question")):
        return None
    span = _read(first_field(spelled, *SPANS))
    if isinstance(span, (list, tuple)) and len(span) == 1:
        (span,) = span
    is_pair = isinstance(span, (list, tuple)) and len(span) == 2
    if (
        not is_pair
        or not all(isinstance(each, (int, float)) for each in span)
        or not _text(first_field(spelled, *SENTENCES))
    ):
        return None
    return float(span[0]), float(span[1])


# ---- media ----


def _media(
    spelled: Mapping[str, Any], named: Mapping[str, Any], index: int, media_root: str | None
) -> tuple[dict[str, tuple[str, ...]], str]:
    """The files of a document, and the name of the first of them."""
    files = next(_files(spelled), [])
    videos = [name for name in files if not urlsplit(name).path.lower().endswith(PICTURE_SUFFIXES)]
    pictures = tuple(str(Path(media_root or "", name)) for name in files if name not in videos)
    places_images = any("<image>" in _text(spelled.get(name)) for name in QUESTIONS)
    field = next((name for name in IMAGES if spelled.get(name) is not None and len(spelled[name])), None)
    if field is not None and not pictures and (places_images or not videos):
        pictures = media_field(spelled, field, "image", index, media_root)
    if not videos and not pictures:
        missing = "'video_path', 'video_name', 'videoID' and 'video_id'"
        raise missing_field_error(named, index, "video", f", and so are {missing}")
    paths = tuple(name if "://" in name else find_video(name, media_root) for name in videos)
    media = {"videos": paths, "images": pictures} if pictures else {"videos": paths}
    sounds = spelled.get(SOUNDS)
    if isinstance(sounds, (list, tuple)):  # one file is the track of the video
        media["audios"] = tuple(str(Path(media_root or "", str(name))) for name in sounds)
    return media, (videos or [Path(pictures[0]).name])[0]


def _files(spelled: Mapping[str, Any]) -> Iterator[list[str]]:
    """The files of each field that names some."""
    for name in VIDEOS:
        given = _read(spelled.get(name))
        listed = list(given) if isinstance(given, (list, tuple)) else [given]
        paths = [first_field(one, "path", "video", "name") if isinstance(one, Mapping) else one for one in listed]
        texts = [str(path) for path in paths if not is_null(path) and not isinstance(path, (list, bytes)) and str(path)]
        if texts:
            yield texts


def _shown_part(doc: Mapping[str, Any]) -> dict[str, Any]:
    """`span_s` of a document whose question is about a part of its video."""
    try:
        start, end = float(doc["Start"]), float(doc["End"])
    except (KeyError, TypeError, ValueError):
        return {}
    return {"span_s": [start, end]} if 0 <= start < end else {}
