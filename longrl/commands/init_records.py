"""The records of a starting folder: the user's, read and parted into training and test, or three drawn examples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from longrl.datamodules.loading.skips import GRACE_ROWS
from longrl.datamodules.media.opening import DEFAULT_MEDIA_LIMITS
from longrl.datamodules.media.video import known_index
from longrl.datamodules.rows.other_schemas import best_row_function
from longrl.datamodules.rows.question_rows import RowFunction, make_rows
from longrl.datamodules.rows.sources import Record, media_root_of, read_records
from longrl.io.jsonl import write_jsonl
from longrl.io.one_line import one_line
from longrl.testing.example_clips import QUESTIONS_FILE, write_example_clips
from longrl.types import Row, UnusableSample

TRAIN_FILE, TEST_FILE = "train.jsonl", "test.jsonl"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
EXAMPLE_VIDEOS = 3
MAX_MEASURED = 50
"""Videos whose length is looked at: one pass over the packets of each."""
MAX_SKIPPED_SHARE = 0.05
"""`data.max_skipped_share` of the configs."""
MAX_TOLD = 3
MAX_CHARACTERS = 240


@dataclass(frozen=True)
class StartRecords:
    """What a starting folder's configs say of records, and the files that hold them."""

    files: dict[str, list[Record]]
    """Name in the folder -> records."""
    train: str
    """Name of the file that is trained on."""
    test: str
    """Name of the file of `test`."""
    media_root: str
    row_function: str | None
    """Import path of what reads the records; None if nothing does."""
    num_unread: int
    has_reasoning: bool
    example: tuple[str, str]
    """A question and the path of its video."""
    told: tuple[str, ...] = ()
    """What was found, for people."""

    @property
    def num_train(self) -> int:
        """Records that are trained on."""
        return len(self.files[self.train])

    def write(self, folder: Path) -> None:
        """Writes the files."""
        for name, records in self.files.items():
            write_jsonl(folder / name, records)


def example_records(work: Path, root: Path) -> StartRecords:
    """Draws three videos into `work`/videos; one question about each, trained on and tested alike.

    Args:
        work: the folder while it is written.
        root: where it will be.
    """
    records = write_example_clips(work / "videos", EXAMPLE_VIDEOS, questions_per_video=1)
    (work / "videos" / QUESTIONS_FILE).unlink()
    media_root = root / "videos"
    row_function, rows = _read(records, str(media_root))
    example = (_question(rows[0]), str(media_root / records[0]["video"]))
    files = {QUESTIONS_FILE: records}
    return StartRecords(files, QUESTIONS_FILE, QUESTIONS_FILE, str(media_root), row_function, 0, True, example)


def own_records(questions: str, videos: str | None, test_share: float) -> StartRecords:
    """Reads the user's records and keeps some videos' questions for `test`.

    Args:
        questions: a file of `SUFFIXES`.
        videos: folder that the records' paths start in; None for that of the file.
        test_share: share of the videos.

    Raises:
        ValueError: a path leads nowhere, the file cannot be read, or the share is none.
    """
    if not 0 <= test_share < 1:
        raise ValueError(f"--test_share must be at least 0 and below 1, got {test_share}")
    if not questions.endswith(SUFFIXES):
        raise ValueError(
            f"--questions must be a {', '.join(SUFFIXES)} file, got {questions!r}; leave it out, and name a parquet "
            "file or a hub id owner/name:split in data.train of sft.yaml and rl.yaml"
        )
    media_root = str(Path(videos or media_root_of(questions) or ".").expanduser().resolve())
    if not Path(media_root).is_dir():
        raise ValueError(f"--videos {videos!r} is no folder (working folder: {Path.cwd()}); correct the path")
    records = list(read_records(questions))
    row_function, rows = _read(records, media_root)
    told = [_told_fit(questions, row_function, rows)]
    told += _told_videos(rows)
    train, test = _parted(records, rows, test_share)
    files = {TRAIN_FILE: train} | ({TEST_FILE: test} if test else {})
    read = [row for row in rows if isinstance(row, Row)]
    reasoned = sum(bool(row.reasoning or row.trace or row.response) for row in read)
    if read and not reasoned:
        told.append(
            "no record has `reasoning`, which SFT teaches: begin with RL (rl.yaml starts from the released model)"
        )
    first = next((row for row in read if row.videos), None)
    return StartRecords(
        files=files,
        train=TRAIN_FILE,
        test=TEST_FILE if test else TRAIN_FILE,
        media_root=media_root,
        row_function=row_function,
        num_unread=len(rows) - len(read),
        has_reasoning=bool(reasoned),
        example=("What happens in the video?", "VIDEO.mp4") if first is None else (_question(first), first.videos[0]),
        told=(*told, f"{len(train)} records to train on, {len(test)} for `test`, about other videos"),
    )


def _read(records: Sequence[Record], media_root: str) -> tuple[str | None, list[Row | ValueError]]:
    """Import path of the row function that reads most records, and its rows or errors, one for each record."""
    function, path = best_row_function(records, media_root)
    return path, [_row_of(record, index, function, media_root) for index, record in enumerate(records)]


def _row_of(record: Record, index: int, function: RowFunction, media_root: str) -> Row | ValueError:
    """The first row of a record, or an error if none of its questions can be used."""
    made = make_rows([record], lambda one, _, root: function(one, index, root), media_root)
    no_row = ValueError(f"record {index} holds no question")
    return next((one for one in made if isinstance(one, Row)), made[0] if made else no_row)


def _question(row: Row | ValueError) -> str:
    return row.problem if isinstance(row, Row) else ""


def _parted(
    records: Sequence[Record], rows: Sequence[Row | ValueError], test_share: float
) -> tuple[list[Record], list[Record]]:
    """Records to train on and others, about other videos: no video is in both."""
    of_record = [row.videos if isinstance(row, Row) and row.videos else (str(n),) for n, row in enumerate(rows)]
    videos = sorted(set(of_record))
    Random(0).shuffle(videos)
    num_kept = max(round(test_share * len(videos)), 1) if test_share > 0 else 0
    kept = set(videos[: min(num_kept, len(videos) - 1)])  # one at least is trained on
    train = [record for record, of in zip(records, of_record, strict=True) if of not in kept]
    test = [record for record, of in zip(records, of_record, strict=True) if of in kept]
    return train, test


def _told_fit(questions: str, row_function: str | None, rows: Sequence[Row | ValueError]) -> str:
    """How many records can be used, and what is wrong with the others."""
    errors = [row for row in rows if isinstance(row, ValueError)]
    read = len(rows) - len(errors)
    reader = f"read by {row_function}" if row_function else "read; write the function to_row in my_rows.py for them"
    text = f"{questions}: {read} of {len(rows)} records are {reader}"
    return f"{text}; the first that is not: {one_line(str(errors[0]), MAX_CHARACTERS)}" if errors else text


@dataclass(frozen=True)
class Videos:
    """What the videos of rows are like."""

    lengths_s: list[float]
    """Of those that were looked at and can be read."""
    unusable: dict[str, str]
    """Path -> what is wrong with it."""


def look_at_videos(paths: Sequence[str]) -> Videos:
    """Finds the videos that are missing, and of the first ones those that cannot be read, and their lengths."""
    unusable = {path: "the file does not exist" for path in paths if not Path(path).exists()}
    lengths_s = []
    for path in [path for path in paths if path not in unusable][:MAX_MEASURED]:
        try:
            index = known_index(path, DEFAULT_MEDIA_LIMITS)
        except (UnusableSample, OSError) as error:
            unusable[path] = str(error).removeprefix(f"{path}: ")
            continue
        if index.missing_s:
            unusable[path] = f"it is torn: the last {index.missing_s:.1f} s are missing"
        else:
            lengths_s.append(index.end_s - float(index.starts[0]))
    return Videos(lengths_s, unusable)


def _told_videos(rows: Sequence[Row | ValueError]) -> list[str]:
    """How long the videos are, which cannot be used, and whether the run will put up with that."""
    read = [row for row in rows if isinstance(row, Row)]
    paths = list(dict.fromkeys(path for row in read for path in row.videos))
    videos = look_at_videos(paths)
    told = []
    if videos.lengths_s:
        of = f" (of {MAX_MEASURED} looked at)" if len(paths) > MAX_MEASURED else ""
        middle, longest = statistics.median(videos.lengths_s), max(videos.lengths_s)
        told.append(f"{len(paths)} videos, {middle:.0f} s long in the median, {longest:.0f} s at most{of}")
    if videos.unusable:
        named = [f"{path}: {one_line(reason, MAX_CHARACTERS)}" for path, reason in videos.unusable.items()]
        told += [f"{len(named)} of {len(paths)} videos cannot be used", *(f"  {text}" for text in named[:MAX_TOLD])]
    lost = [row for row in rows if isinstance(row, ValueError) or videos.unusable.keys() & set(row.videos)]
    if len(lost) > max(GRACE_ROWS, MAX_SKIPPED_SHARE * len(rows)) or len(lost) == len(rows):
        told.append(
            f"{len(lost)} of {len(rows)} records cannot be used, and a run ends above {GRACE_ROWS} of them and "
            f"data.max_skipped_share={MAX_SKIPPED_SHARE}: correct them, or raise it in sft.yaml and rl.yaml"
        )
    without = sum(not (row.videos or row.images or row.audios) for row in read)
    if without:
        told.append(f"{without} of {len(rows)} records name no video: they are asked as text alone")
    return told
