"""Records of any source as `Row`s: one reader for files and hub data sets, one plain function per record schema.

A row function `(record, index, media_root) -> Row` is chosen by import path (`data.row_function`), so another schema is
another function in any module: nothing is registered.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from longrl.types import Row

Record = dict[str, Any]
RowFunction = Callable[[Record, int, str | None], Row]

FILE_SUFFIXES = (".json", ".jsonl", ".parquet")
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
THINK_TAG = re.compile(r"<think>(.*?)</think>", re.DOTALL | re.IGNORECASE)
LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
LETTERED = re.compile(r"\(?[A-Z][).:]\s")
HUB_SOURCE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.\[\]%+:-]+))?")


# ---------------------------------------------------------------------------------------------------------- sources


def read_records(source: str | Path) -> list[Record]:
    """All records of a source.

    Args:
        source: a `.json` (list of records), `.jsonl` or `.parquet` file, or a hub id `owner/name:split`; the split is
            `train` when left out, and may be sliced as `datasets` allows: `owner/name:train[:1%]`.

    Raises:
        ValueError: nothing there, not readable, or no record in it.
    """
    path = Path(source).expanduser()
    if path.suffix in FILE_SUFFIXES:
        records = _read_file(path)
    elif hub := HUB_SOURCE.fullmatch(str(source)):
        records = _read_hub(hub["name"], hub["split"] or "train")
    else:
        raise ValueError(
            f"a data source is a {', '.join(FILE_SUFFIXES)} file or a hub id owner/name:split, got {str(source)!r}"
        )
    if not records:
        raise ValueError(f"{source} holds no record; give a source with at least one")
    return records


def media_root_of(source: str | Path) -> str | None:
    """Where relative media paths of a source start unless the user says so: beside a file, nowhere for a hub id."""
    path = Path(source).expanduser()
    return str(path.parent) if path.suffix in FILE_SUFFIXES else None


def _read_file(path: Path) -> list[Record]:
    if not path.is_file():
        raise ValueError(f"the data file {str(path)!r} does not exist (working folder: {Path.cwd()}); correct the path")
    if path.suffix == ".parquet":
        from pyarrow import parquet  # type: ignore[import-untyped]

        return parquet.read_table(path).to_pylist()
    return _read_json(path) if path.suffix == ".json" else _read_jsonl(path)


def _read_json(path: Path) -> list[Record]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; name a file of one record per line .jsonl") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must hold a list of records, got {type(records).__name__}")
    return records


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is no JSON: {error}; is the file cut off?") from error
            if not isinstance(record, dict):
                raise ValueError(f"line {number} of {path} must hold a record, got {type(record).__name__}")
            records.append(record)
    return records


def _read_hub(name: str, split: str) -> list[Record]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split
        raise ValueError(
            f"the data set {name!r} with split {split!r} could not be loaded: {error}; give a local "
            f"{', '.join(FILE_SUFFIXES)} file, or check the name and the network"
        ) from error
    return list(rows.with_format(None))


# ------------------------------------------------------------------------------------------------------ row functions


def longvideo_reason_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A record of LongVideo-Reason (arXiv:2507.07966), of the synthetic data, or of other media in the same schema.

    Fields: `problem` and `answer` ("<answer>B</answer>" or plain) are needed; `problem_id`, `data_type`,
    `problem_type` (the category), `reasoning`, `videos`, `images` and `audios` (a path or a list of them) and `task`
    may be absent or null, and `metadata` (such as the `tolerance` of a number) too. A record whose `data_type` is
    `video`, `image` or `audio` must name its medium.

    Raises:
        ValueError: a field is missing; the message names the record and the fields it has.
    """
    problem, answer = _text(record, "problem", index), plain_answer(_text(record, "answer", index))
    data_type = str(record.get("data_type") or "")
    videos, images, audios = (_paths(record, field, index, media_root) for field in ("videos", "images", "audios"))
    has_media = bool(videos or images or audios)
    if data_type in ("video", "image", "audio") and not has_media:
        raise _lacks(record, index, f"{data_type}s", f", though its data_type is {data_type!r}")
    task = str(record.get("task") or infer_task(problem, answer, has_media=has_media))
    return Row(
        id=_id(record, index),
        problem=problem,
        answer=option_letter(problem, answer) if task == "multiple_choice" else answer,
        task=task,
        category=str(record.get("problem_type") or data_type or "general"),
        videos=videos,
        images=images,
        audios=audios,
        reasoning=plain_reasoning(record.get("reasoning")),
        metadata=record.get("metadata") or {},
    )


def text_math_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A mathematics record: `problem` or `question`, and `answer`; GSM8K's "reasoning #### answer" is taken apart."""
    problem = _text(record, "problem" if "problem" in record else "question", index)
    reasoning, mark, answer = _text(record, "answer", index).rpartition("####")
    return Row(
        id=_id(record, index),
        problem=problem,
        answer=plain_answer(answer),
        task="math",
        category=str(record.get("problem_type") or record.get("type") or "math"),
        reasoning=plain_reasoning(reasoning if mark else record.get("reasoning")),
    )


def image_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question about images: as `longvideo_reason_row`, but `images` (or `image`) must not be empty.

    Images inside the record, as `datasets` and parquet files hold them (`{"bytes", "path"}` or a PIL image), are
    written to `media_root/.images`, each once.
    """
    images = record.get("images") or record.get("image") or []
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    paths = [item if isinstance(item, str) else _write_image(item, index, media_root) for item in images]
    return longvideo_reason_row({**record, "images": paths, "data_type": "image"}, index, media_root)


def _write_image(image: Any, index: int, media_root: str | None) -> str:
    """The path, relative to `media_root`, of a file with the image; named by its content."""
    content = _image_bytes(image)
    if content is None:
        return str(image["path"])
    if media_root is None:
        raise ValueError(f"record {index} holds an image; set data.media_root to a folder where it may be written")
    path = Path(media_root, ".images", hashlib.sha256(content).hexdigest()[:32])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(path)  # other ranks write the same file
    return str(path.relative_to(media_root))


def _image_bytes(image: Any) -> bytes | None:
    """An encoded image; None if it is a path only."""
    if isinstance(image, Mapping):
        return image.get("bytes")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


VIDEO_R1_TASKS = {
    "multiple choice": "multiple_choice",
    "numerical": "numeric",
    "regression": "numeric",
    "OCR": "exact",
    "free-form": "open_ended",
}


def video_r1_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A Video-R1 record (arXiv:2503.21776): `options` apart, `solution` in a tag, `process`, and one `path`."""
    kind = str(record.get("data_type") or "video")
    problem = "\n".join([_text(record, "problem", index), *(record.get("options") or [])])
    answer = plain_answer(_text(record, "solution", index))
    paths = _paths(record, "path", index, media_root)
    if not paths:
        raise _lacks(record, index, "path")
    problem_type = str(record.get("problem_type") or "general")
    task = VIDEO_R1_TASKS.get(problem_type) or infer_task(problem, answer, has_media=True)
    return Row(
        id=_id(record, index),
        problem=problem,
        answer=option_letter(problem, answer) if task == "multiple_choice" else answer,
        task=task,
        category=problem_type,
        videos=paths if kind == "video" else (),
        images=paths if kind == "image" else (),
        reasoning=plain_reasoning(record.get("process")),
    )


def audio_qa_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question about a sound, or about a video and its sound, with its options apart (as in MMAU or AVQA).

    Fields: `question` (or `problem`); `options` or `choices`, a list of wordings; `answer`, a letter, a wording or, as
    an integer, the place of an option from 0 on; `audio` or `audios`, `video` or `videos`, `image` or `images`, a path
    or a list of them. `id`, `category` (or `task`) and `reasoning` may be absent. That a video's own track is heard is
    the family's `use_audio_in_video`.
    """
    options = [str(option).strip() for option in record.get("options") or record.get("choices") or ()]
    lettered = [option if LETTERED.match(option) else f"{chr(65 + n)}. {option}" for n, option in enumerate(options)]
    question, answer = _text(record, "question" if "question" in record else "problem", index), record.get("answer")
    if options and isinstance(answer, int) and 0 <= answer < len(options):
        answer = chr(65 + answer)
    media = {f"{kind}s": record.get(f"{kind}s") or record.get(kind) for kind in ("video", "image", "audio")}
    if not any(media.values()):
        raise _lacks(record, index, "audio", ", and so are 'video' and 'image'")
    known = {
        "problem_id": record.get("problem_id", record.get("id")),
        "problem": "\n".join([question, *lettered]),
        "problem_type": record.get("category") or record.get("task"),
        "answer": answer,
        "reasoning": record.get("reasoning"),
        "data_type": "video" if media["videos"] else "audio",
    }
    return longvideo_reason_row(known | media, index, media_root)


# --------------------------------------------------------------------------------------------------------- the parts


def infer_task(problem: str, answer: str, *, has_media: bool) -> str:
    """What kind of answer is wanted, for records that do not say.

    A letter or one of the problem's options, or any answer about media to a problem with options: `multiple_choice`. A
    number: `numeric` about media, `math` in text. Anything else: `open_ended`.
    """
    from longrl.rewards.choice import parse_options
    from longrl.rewards.numeric import number

    is_letter = LETTER.fullmatch(option_letter(problem, answer)) is not None
    if (is_letter or has_media) if parse_options(problem) else (is_letter and has_media):
        return "multiple_choice"
    if number(answer) is not None and not re.search(r"[^\W\d_]{2}", answer):
        return "numeric" if has_media else "math"
    return "open_ended"


def plain_answer(text: str) -> str:
    """The content of the last `<answer>` tag, or the text."""
    found = ANSWER_TAG.findall(text)
    return (found[-1] if found else text).strip()


def option_letter(problem: str, answer: str) -> str:
    """The letter that an answer means: "(b)." is B, and so are "B. dog" and "dog" if that is option B.

    Returns:
        The answer as it is, if it means none.
    """
    from longrl.rewards.choice import parse_options

    if letter := LETTER.fullmatch(answer):
        return letter[1].upper()
    for option, wording in parse_options(problem).items():
        if answer in (wording, f"{option}. {wording}", f"{option}) {wording}", f"({option}) {wording}"):
            return option
    return answer


def plain_reasoning(text: object) -> str | None:
    """Reasoning without `<think>` tags and a trailing answer tag; None when there is none."""
    if not isinstance(text, str):
        return None
    found = THINK_TAG.search(text)
    return (found[1] if found else ANSWER_TAG.sub("", text)).strip() or None


def _text(record: Mapping[str, Any], field: str, index: int) -> str:
    value = record.get(field)
    if value is None or not str(value).strip():
        raise _lacks(record, index, field)
    return str(value).strip()


def _paths(record: Mapping[str, Any], field: str, index: int, media_root: str | None) -> tuple[str, ...]:
    """Paths of a field that holds one, several or none; relative ones start at `media_root`."""
    value = record.get(field) or ()
    paths = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(path, str) and path for path in paths):
        kinds = sorted({type(path).__name__ for path in paths})
        raise ValueError(
            f"record {index} (id {_id(record, index)!r}): {field!r} must hold file paths, got {', '.join(kinds)}; name "
            "files, or use data.row_function=longrl.datamodules.rows.image_row for images inside the records"
        )
    return tuple(os.path.join(media_root or "", os.path.expanduser(path)) for path in paths)


def _id(record: Mapping[str, Any], index: int) -> str:
    value = record.get("problem_id", record.get("id"))
    return str(index if value is None else value)


def _lacks(record: Mapping[str, Any], index: int, field: str, why: str = "") -> ValueError:
    state = ("is empty" if field in record else "is missing") + why
    return ValueError(
        f"record {index} (id {_id(record, index)!r}) needs {field!r}, which {state}; the record has "
        f"{', '.join(map(str, record)) or 'no field'}. Correct it, or choose the row function of its schema with "
        "data.row_function"
    )


def load_row_function(path: str) -> RowFunction:
    """The function at an import path (`longrl.datamodules.rows.image_row`) or in a file (`my/rows.py:my_row`).

    Raises:
        ValueError: nothing of that name is there.
    """
    location, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        return getattr(_load_file(location) if ":" in path else importlib.import_module(location), name)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ValueError(
            f"data.row_function={path!r} was not found: {error}; give an import path such as "
            "longrl.datamodules.rows.longvideo_reason_row, or file.py:function"
        ) from error


def _load_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_media_tags(row: Row) -> None:
    """Raises ValueError if the problem has `<image>`, `<video>` or `<audio>` tags, but not one for each medium."""
    from longrl.models.base import MEDIA_TAG

    tags = MEDIA_TAG.findall(row.problem)
    wanted = {"image": len(row.images), "video": len(row.videos), "audio": len(row.audios)}
    if tags and any(tags.count(kind) != count for kind, count in wanted.items()):
        media = " and ".join(f"{count} {kind}s" for kind, count in wanted.items() if count or kind != "audio")
        raise ValueError(
            f"row {row.id!r} has {media}, but its problem places "
            f"{', '.join(f'<{tag}>' for tag in tags)}; name every medium once, or none (then they come first)"
        )


def make_rows(records: Iterable[Record], row_function: RowFunction, media_root: str | None) -> list[Row | ValueError]:
    """A checked row of each record, or the error that says what is wrong with it."""
    from longrl.rewards.tasks import check_answer

    rows: list[Row | ValueError] = []
    for index, record in enumerate(records):
        try:
            row = row_function(record, index, media_root)
            check_answer(row)
            check_media_tags(row)
        except ValueError as error:
            rows.append(error)
        else:
            rows.append(row)
    return rows
