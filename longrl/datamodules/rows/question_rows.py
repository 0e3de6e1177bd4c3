"""Records as `Row`s: one plain function per record schema.

A row function `(record, index, media_root) -> Row` is chosen by import path (`data.row_function`), so another schema is
another function in any module: nothing is registered. A record with several questions gives a list, in which a
`ValueError` stands for a question that cannot be used. Benchmarks and published video sets are in `published.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from longrl.datamodules.rows.conversations import is_conversation, read_conversation, read_tools, read_trace
from longrl.datamodules.rows.pairs import is_pair, plain_pair
from longrl.datamodules.rows.record_fields import (
    first_field,
    is_null,
    media_fields,
    metadata_field,
    missing_field_error,
    record_id,
    text_field,
)
from longrl.datamodules.rows.sources import Record
from longrl.io.tags import tagged_parts, without_tagged
from longrl.types import Row

Result = TypeVar("Result")
RowFunction = Callable[[Record, int, str | None], Row | Sequence[Row | ValueError]]
ROW_ARGUMENTS = ("record", "index", "media_root")

LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
LABEL = re.compile(r"\(?([A-Za-z]{1,2}|\d{1,2})[).:]?")
LABELLED = re.compile(r"\(?([A-Z]{1,2})[).:]\s")


# ------------------------------------------------------------------------------------------------------ row functions


def longvideo_reason_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A record of LongVideo-Reason (arXiv:2507.07966), of the synthetic data, or of other media in the same schema.

    Fields: `problem` and `answer` (`<answer>B</answer>` or plain) are needed; `problem_id`, `data_type`,
    `problem_type` (the category), `reasoning`, `videos`, `images` and `audios` (`record_media.py` says in which forms)
    and `task` may be absent or null, and `metadata` (such as the `tolerance` of a number) too. A record whose
    `data_type` is `video`, `image` or `audio` must have one. A record of `messages` is read by `chat_row`.

    `trace`, turns of the assistant with tools' answers between them, is the SFT target (`traces.py`), and prompts offer
    `tools`. `chosen` is an answer to the letter: the SFT target, or of a pair, whose other answer is `rejected`, the
    better one; `pairs.py` says in which spellings.

    Raises:
        ValueError: a field is missing; the message names the record and the fields it has.
    """
    record = _with_plain_pair(record, index)
    if "problem" not in record and is_conversation(record):
        return chat_row(record, index, media_root)
    data_type = str(record.get("data_type") or "")
    media = media_fields(record, index, media_root)
    if data_type in ("video", "image", "audio") and not any(media.values()):
        raise missing_field_error(record, index, f"{data_type}s", f", though its data_type is {data_type!r}")
    fields = {
        "task": record.get("task"),
        "category": record.get("problem_type") or data_type,
        "reasoning": record.get("reasoning"),
        "metadata": metadata_field(record, index, media_root),
        **answer_texts(record),
        **media,
    }
    try:
        fields["trace"] = read_trace(record, media_root, media["videos"])
        tools = read_tools(record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {index} (id {record_id(record, index)!r}) {error}") from error
    if tools:
        fields["metadata"] = fields["metadata"] | {"tools": tools}
    return question_row(record, index, text_field(record, "problem", index), fields)


def _with_plain_pair(record: Record, index: int) -> Record:
    """A record whose pair of answers, if it has one, is in longrl's own spelling."""
    if not is_pair(record):
        return record
    try:
        return plain_pair(record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {index} (id {record_id(record, index)!r}) {error}") from error


def answer_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """The answers to the letter of a record, as fields of a row."""
    named = {"response": record.get("chosen"), "rejected": record.get("rejected")}
    return {name: text for name, text in named.items() if isinstance(text, str)}


def open_ended_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """As `longvideo_reason_row` of a record whose answer is a text, also where it looks like a number or a letter."""
    return longvideo_reason_row({**record, "task": "open_ended"}, index, media_root)


def chat_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A conversation, shown as it is: `messages`, or TRL's `prompt` and `completion`; see `conversations.py`.

    The assistant's last message is the SFT target or, where tools answer before it, all that follows the last question.
    `answer`, `solution` or `ground_truth` is what RL and evaluation
    judge by; without one it is the target's own answer, and the task `open_ended` unless `task` says which. Of the
    templates of `data` none is used. Pairs are read as by `longvideo_reason_row`.
    """
    from longrl.rewards.answers import lenient_text

    record = _with_plain_pair(record, index)
    try:
        chat = read_conversation(record, media_root)
        tools = read_tools(record)
    except (ValueError, TypeError) as error:
        raise ValueError(f"record {index} (id {record_id(record, index)!r}) {error}") from error
    answer = first_field(record, "answer", "solution", "ground_truth")
    task = record.get("task")
    if answer is None and chat.response is not None:
        answer = lenient_text(chat.response) or chat.response
        task = task or "open_ended"
    fields = {
        "answer": answer,
        "task": task,
        "category": first_field(record, "problem_type", "category"),
        "metadata": metadata_field(record, index, media_root) | ({"tools": tools} if tools else {}),
        "messages": chat.messages,
        "trace": chat.trace,
        **({"response": chat.response} | answer_texts(record)),
        **chat.media,
    }
    return question_row(record, index, chat.question, fields)


def text_math_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A mathematics record: `problem` or `question`, and `answer`; GSM8K's "reasoning #### answer" is taken apart."""
    reasoning, mark, answer = text_field(record, "answer", index).rpartition("####")
    fields = {
        "answer": answer,
        "task": "math",
        "category": record.get("problem_type") or record.get("type") or "math",
        "reasoning": reasoning if mark else record.get("reasoning"),
    }
    question = text_field(record, "problem" if "problem" in record else "question", index)
    return question_row(record, index, question, fields)


def image_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question about images: as `longvideo_reason_row`, but `images` (or `image`) must not be empty."""
    images = record.get("images") or record.get("image") or []
    return longvideo_reason_row({**record, "images": images, "data_type": "image"}, index, media_root)


def clevr_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question about images of CLEVR (arXiv:1612.06890), counted or named; `solution` may stand for `answer`."""
    answer = _answer_or_solution(record, index)
    task = "numeric" if answer.isdigit() else "exact"
    known = {"answer": answer, "task": task, "problem_type": record.get("problem_type") or "clevr"}
    return image_row(record | known, index, media_root)


def geometry_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A geometry problem with its figures, as Geometry3K (arXiv:2105.04165): the answer is a formula or a letter.

    `images` may be any number, placed by `<image>` in `problem` or coming first; `solution` may stand for `answer`.
    """
    answer = _answer_or_solution(record, index)
    inferred = infer_task(text_field(record, "problem", index), answer, has_media=True)
    task = inferred if inferred == "multiple_choice" else "math"
    known = {"answer": answer, "task": task, "problem_type": record.get("problem_type") or "geometry"}
    return image_row(record | known, index, media_root)


def _answer_or_solution(record: Record, index: int) -> str:
    return plain_answer(text_field(record, "answer" if record.get("answer") is not None else "solution", index))


def audio_qa_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question about a sound, or about a video and its sound, with its options apart (as in MMAU or AVQA).

    Fields: `question` (or `problem`); `options` or `choices`, a list of wordings; `answer`, a letter, a wording or, as
    an integer, the index of an option from 0 on; `audio` or `audios`, `video` or `videos`, `image` or `images`, a path
    or a list of them. `id`, `category` (or `task`) and `reasoning` may be absent. That a video's own track is heard is
    the family's `use_audio_in_video`.
    """
    files = {f"{kind}s": record.get(f"{kind}s") or record.get(kind) for kind in ("video", "image", "audio")}
    if not any(files.values()):
        raise missing_field_error(record, index, "audio", ", and so are 'video' and 'image'")
    fields = {
        "id": str(first_field(record, "problem_id", "id", default=index)),
        "options": record.get("options") or record.get("choices"),
        "category": record.get("category") or record.get("task") or ("video" if files["videos"] else "audio"),
        "reasoning": record.get("reasoning"),
        **media_fields(record | files, index, media_root),
    }
    question = text_field(record, "question" if "question" in record else "problem", index)
    return question_row(record, index, question, fields)


# --------------------------------------------------------------------------------------------------------- the parts


def question_row(record: Mapping[str, Any], index: int, question: str, fields: Mapping[str, Any]) -> Row:
    """A row with its options behind the question, each with its letter.

    Args:
        record: has the answer and the id where they are not among `fields`.
        index: of the record.
        question: without options that are apart from it.
        fields: of the row, besides `options`: wordings, None where the question has none apart from its text. `answer`
            may be an option's letter, its wording or, as an integer, its index from 0 on; `task` is inferred from
            question and answer when None.
    """
    from longrl.rewards.options import option_label

    known = dict(fields)
    task = known.pop("task", None)
    if not (task is None or isinstance(task, str)):
        raise ValueError(f"record {index} (id {record_id(record, index)!r}): 'task' must be a text, got {task!r:.60}")
    options = known.pop("options", None)
    wordings = given_options(options or (), record, index)
    if task == "multiple_choice" and options is not None and not wordings:
        raise missing_field_error(record, index, "options")
    problem = "\n".join([question, *lettered_options(wordings)])
    answer = known.pop("answer", record.get("answer"))
    if isinstance(answer, float) and answer.is_integer() and wordings:  # a table's column of numbers with gaps
        answer = int(answer)
    if isinstance(answer, int) and wordings:
        answer = option_label(answer) if 0 <= answer < len(wordings) else f"option number {answer}"
    answer = plain_answer("" if answer is None else str(answer))
    if not answer:
        raise missing_field_error(record, index, "answer")
    has_media = any(known.get(name) for name in ("videos", "images", "audios"))
    task = task or infer_task(problem, answer, has_media=has_media)
    metadata = known.pop("metadata", {})
    return Row(
        id=known.pop("id", None) or record_id(record, index),
        problem=problem,
        answer=option_letter(problem, answer) if task == "multiple_choice" else answer,
        task=task,
        category=str(known.pop("category", None) or "general"),
        reasoning=plain_reasoning(known.pop("reasoning", None)),
        metadata={name: value for name, value in metadata.items() if not is_null(value)},
        **known,
    )


def given_options(options: Any, record: Mapping[str, Any], index: int) -> list[Any]:
    """The wordings of a question's options, without the empty places behind them, as tables fill them up.

    Raises:
        ValueError: they are no list, but a text for instance; or a place before another option is empty, so that nobody
            knows what the letters behind it mean.
    """
    if isinstance(options, (str, bytes, Mapping)) or not isinstance(options, Iterable):
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): options must be a list of wordings, got "
            f"{options!r:.100}; correct it, or choose the row function of its schema with data.row_function"
        )
    wordings = list(options)
    while wordings and is_null(wordings[-1]):
        wordings.pop()
    if any(is_null(wording) for wording in wordings):
        raise ValueError(
            f"record {index} (id {record_id(record, index)!r}): an option before the last is null, got {wordings}; "
            "correct it"
        )
    return wordings


def infer_task(problem: str, answer: str, *, has_media: bool) -> str:
    """The kind of answer that is wanted, for records that do not say.

    A letter or one of the problem's options, or any answer about media to a problem with options: `multiple_choice`. A
    number: `numeric` about media, `math` in text. Anything else: `open_ended`. A numbered list may be what is asked
    about: it counts as options about media, for an answer that is one of them.
    """
    from longrl.rewards.numeric import number
    from longrl.rewards.options import parse_options

    options, label = parse_options(problem), option_letter(problem, answer)
    is_letter = label in options or LETTER.fullmatch(label) is not None
    if "1" in options:
        is_choice = has_media and label in options
    else:
        is_choice = (is_letter or has_media) if options else (is_letter and has_media)
    if is_choice:
        return "multiple_choice"
    if number(answer) is not None and not re.search(r"[^\W\d_]{2}", answer):
        return "numeric" if has_media else "math"
    return "open_ended"


def lettered_options(options: Iterable[object]) -> list[str]:
    """The wordings of a question's options, each with its letter: ["cat", "dog"] gives ["A. cat", "B. dog"].

    AA follows Z. They stay as they are if all have their letters already: ["A. cat", "(B) dog"].
    """
    from longrl.rewards.options import option_label

    wordings = [str(option).strip() for option in options]
    labels = [LABELLED.match(wording) for wording in wordings]
    if all(match and match[1] == option_label(index) for index, match in enumerate(labels)):
        return wordings
    return [f"{option_label(index)}. {wording}" for index, wording in enumerate(wordings)]


def plain_answer(text: str) -> str:
    """The content of the last `<answer>` tag, or the text."""
    contents = [part.content for part in tagged_parts(text, "answer")]
    return (contents[-1] if contents else text).strip()


def option_letter(problem: str, answer: str) -> str:
    """The letter that an answer means: "(b)." is B, and so are "B. dog" and "dog" if that is option B.

    Where a problem's options are numbered, their numbers are meant alike.

    Returns:
        The answer as it is, if it means none.
    """
    from longrl.rewards.options import parse_options

    options = parse_options(problem)
    label = (LABEL if options else LETTER).fullmatch(answer)
    if label and (not options or label[1].upper() in options):
        return label[1].upper()
    for option, wording in options.items():
        if answer in (wording, f"{option}. {wording}", f"{option}) {wording}", f"({option}) {wording}"):
            return option
    return answer


def plain_reasoning(text: object) -> str | None:
    """Reasoning without `<think>` tags and a trailing answer tag; None when there is none."""
    if not isinstance(text, str):
        return None
    thinking = next(tagged_parts(text, "think"), None)
    return (thinking.content if thinking else without_tagged(text, "answer")).strip() or None


def row_or_error(make: Callable[..., Result], *args: Any) -> Result | ValueError:
    """The result of a function for a record, or what is wrong with that: a field of another type may raise anything."""
    try:
        return make(*args)
    except ValueError as error:
        return error
    except (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        which = f"record {args[1]} " if len(args) > 1 else ""
        return ValueError(
            f"{which}cannot be read ({type(error).__name__}: {error}): {str(args[0])[:200]}; correct it, or choose "
            "the row function of its schema with data.row_function"
        )


def make_rows(records: Iterable[Record], row_function: RowFunction, media_root: str | None) -> list[Row | ValueError]:
    """The checked rows of all records; in the place of one that cannot be used, the error that says what is wrong."""
    rows: list[Row | ValueError] = []
    for index, record in enumerate(records):
        if None in record:  # as csv.DictReader names it
            behind = [*record.values()][-1]
            rows.append(
                ValueError(
                    f"record {index} has more cells than its table has columns, {str(behind)[:100]} behind the "
                    "last; put cells that have a separator within quotation marks"
                )
            )
            continue
        made = row_or_error(row_function, record, index, media_root)
        several = [made] if isinstance(made, Row | ValueError) else made
        rows += [row_or_error(_checked_row, row) if isinstance(row, Row) else row for row in several]
    return rows


def _checked_row(row: Row) -> Row:
    """The row, or a ValueError: its answer cannot be judged, or its problem has tags, but not one per media item."""
    from longrl.models.chat_tokens import MEDIA_TAG
    from longrl.rewards.reward_sum import check_answer

    check_answer(row)
    if row.messages:  # their media have places of their own
        return row
    tags = MEDIA_TAG.findall(row.problem)
    expected = {"image": len(row.images), "video": len(row.videos), "audio": len(row.audios)}
    if tags and any(tags.count(kind) != count for kind, count in expected.items()):
        media = " and ".join(f"{count} {kind}s" for kind, count in expected.items() if count or kind != "audio")
        raise ValueError(
            f"row {row.id!r} has {media}, but its problem places "
            f"{', '.join(f'<{tag}>' for tag in tags)}; name every medium once, or none (then they come first)"
        )
    return row
