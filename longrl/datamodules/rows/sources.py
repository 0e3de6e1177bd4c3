"""Records of any source: files and hub data sets, as they are published."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from longrl.io.hub_errors import DATA, HubError, hub_errors
from longrl.io.jsonl import parse_json, read_jsonl
from longrl.io.text_files import read_utf8, utf8_file

Record = dict[str, Any]

FILE_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")
LINE_FIELD, NAME_FIELD = "line", "record_name"
"""What a line of a text file, and the name of a record that a JSON file has under one, are called in the record."""
LINE_BREAK = re.compile(r"\r\n|\r|\n")
"""Ends a line of a text file; what else Unicode has for it may stand within a sentence."""
JOINED = re.compile(r"(?<=\.json)\+(?=[^+]+\.json$)|(?<=\.jsonl)\+(?=[^+]+\.jsonl$)")
"""Between two files that go together."""
RECORDS_PER_BATCH = 64
"""Records of a parquet file that are in memory at once."""
HUB_SOURCE = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%+:-]+))?")


def read_records(source: str | Path) -> Sequence[Record]:
    """All records of a source; those of parquet files and hub data sets are read as they are asked for.

    Args:
        source: a file or a hub id. Files: `.json` (a list of records, or records by name, which is their
            `record_name` then), `.jsonl`, `.parquet`, `.csv` or `.tsv` (all values text, the first line their names),
            `.txt` (the `line` of each record); `a.json+b.json` are two files whose records go together in turn, and
            must agree in the fields that both have. A hub id is `owner/name:split`, or `owner/name/config:split` where
            a data set has several configurations; the split is `train` when left out, and may be sliced as `datasets`
            allows: `owner/name:train[:1%]`.

    Raises:
        ValueError: nothing there, not readable, or no record in it.
    """
    path = Path(source).expanduser()
    parts = JOINED.split(str(source))
    if len(parts) > 1:
        records: Sequence[Record] = _joined(parts)
    elif path.suffix in FILE_SUFFIXES:
        records = _read_file(path)
    elif hub := HUB_SOURCE.fullmatch(str(source)):
        records = _read_hub(hub["name"], hub["config"], hub["split"] or "train")
    else:
        raise ValueError(
            f"a data source is a {', '.join(FILE_SUFFIXES)} file or a hub id owner/name:split, got {str(source)!r}"
        )
    if not len(records):
        raise ValueError(f"{source} holds no record; give a source with at least one")
    return records


def stream_records(source: str, max_records: int | None = None) -> Iterator[Record]:
    """The records of a hub data set as they arrive, in the order of its files: the set is never stored.

    Args:
        source: a hub id, as `read_records` takes it, without a slice of the split.
        max_records: reading ends behind so many; None for all.

    Raises:
        ValueError: no hub id, nothing there, or the connection broke.
    """
    hub = None if Path(source).suffix in FILE_SUFFIXES else HUB_SOURCE.fullmatch(source)
    if hub is None:
        raise ValueError(
            f"streaming is for a hub id owner/name:split, got {source!r}; leave it out, for files are read as they are"
        )
    if "[" in (hub["split"] or ""):
        raise ValueError(f"a streamed split has no slices, got {source!r}; give max_records in place of the slice")
    count = 0
    try:
        for record in _stream_hub(hub["name"], hub["config"], hub["split"] or "train", max_records):
            count += 1
            yield record
    except HubError:
        raise
    except Exception as error:  # the library raises many kinds, and those of the network
        raise ValueError(
            f"the data set {source!r} could not be streamed from record {count} on: {_one_line(error)}; check the "
            "name and the network, or read it without streaming, which keeps a copy"
        ) from error
    if not count:
        raise ValueError(f"{source} holds no record; give a source with at least one")


def media_root_of(source: str | Path) -> str | None:
    """Where relative media paths of a source start unless the user says so: beside a file, nowhere for a hub id."""
    path = Path(JOINED.split(str(source))[0]).expanduser()
    return str(path.parent) if path.suffix in FILE_SUFFIXES else None


def _joined(sources: Sequence[str]) -> list[Record]:
    """The records of two files side by side, such as questions and their answers."""
    first, second = (read_records(one) for one in sources)
    if len(first) != len(second):
        raise ValueError(
            f"{'+'.join(sources)}: files that go together must have as many records, got {len(first)} and "
            f"{len(second)}; give the two of one split"
        )
    joined = []
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        differing = [name for name in one.keys() & other.keys() if one[name] != other[name]]
        if differing:
            name = min(differing)
            raise ValueError(
                f"{'+'.join(sources)}: record {index} has {name} {one[name]!r:.60} in one and {other[name]!r:.60} in "
                "the other; give files of one split in the same order"
            )
        joined.append({**one, **other})
    return joined


def _read_file(path: Path) -> Sequence[Record]:
    if not path.is_file():
        raise ValueError(f"the data file {str(path)!r} does not exist (working folder: {Path.cwd()}); correct the path")
    if path.suffix == ".parquet":
        return ParquetRecords(path)
    if path.suffix in (".csv", ".tsv"):
        delimiter = "," if path.suffix == ".csv" else "\t"
        try:
            with utf8_file(path, newline="") as file:
                table = csv.DictReader(file, delimiter=delimiter)
                records = list(table)
        except csv.Error as error:
            raise ValueError(f"{path} is no table: {error}; is every line cut by {delimiter!r}?") from error
        names = list(table.fieldnames or ())
        if len(names) == 1 and ";" in names[0]:  # as spreadsheets write where the comma is in numbers
            raise ValueError(f"{path} must have its columns between {delimiter!r}, got {names[0]!r}; save it so")
        return records
    if path.suffix == ".txt":
        return [{LINE_FIELD: line} for line in LINE_BREAK.split(read_utf8(path)) if line.strip()]
    return _read_json(path) if path.suffix == ".json" else read_jsonl(path)


def _read_json(path: Path) -> list[Record]:
    try:
        records = parse_json(read_utf8(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}; name a file of one record per line .jsonl") from error
    listed = records
    if isinstance(records, dict) and records:
        named = records.items()
        listed = [{NAME_FIELD: name, **each} if isinstance(each, dict) else each for name, each in named]
    if not isinstance(listed, list) or (listed and not any(isinstance(record, dict) for record in listed)):
        raise ValueError(f"{path} must hold a list of records, or records by name, got {type(records).__name__}")
    other = next((place for place, record in enumerate(listed) if not isinstance(record, dict)), None)
    if other is not None:
        raise ValueError(
            f"{path} must hold a list of records, or records by name; its record {other} (from 0 on) is "
            f"{listed[other]!r:.80}: correct it, or take it out"
        )
    return listed


def _read_hub(name: str, config: str | None, split: str) -> Sequence[Record]:
    import datasets

    try:
        with hub_errors(f"{name}:{split}", DATA, f"give a local {', '.join(FILE_SUFFIXES)} file"):
            rows = datasets.load_dataset(name, config, split=split)
    except HubError:
        raise
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split
        part = f" of configuration {config!r}" if config else ""
        raise ValueError(
            f"the data set {name!r}{part} with split {split!r} could not be loaded: {error}; give a local "
            f"{', '.join(FILE_SUFFIXES)} file, or check the name and the network"
        ) from error
    rows = rows.with_format(None)
    for column, feature in rows.features.items():
        undecoded = _undecoded(feature)
        if undecoded != feature:
            rows = rows.cast_column(column, undecoded)
    return rows


def _stream_hub(name: str, config: str | None, split: str, max_records: int | None) -> Iterator[Record]:
    import datasets

    with hub_errors(f"{name}:{split}", DATA, f"give a local {', '.join(FILE_SUFFIXES)} file"):
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
    rows = rows.decode(False)  # videos, images and sounds as they are stored
    yield from islice(rows, max_records)  # `take` of the library asks for one batch more


def _undecoded(feature: Any) -> Any:
    """A feature of `datasets` by which videos and sounds come as they are stored, not as another library's decoders."""
    import datasets

    if isinstance(feature, (datasets.Video, datasets.Audio)):
        return dataclasses.replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(each) for name, each in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    return feature


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class ParquetRecords(Sequence[Record]):
    """The records of a parquet file, read when they are iterated over: they may hold the content of media.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowException, parquet

        self._path = path
        try:
            self._file = parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path} is no parquet file: {_one_line(error)}; is it cut off?") from error

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __iter__(self) -> Iterator[Record]:
        from pyarrow import ArrowException

        batches = self._file.iter_batches(RECORDS_PER_BATCH)
        first = 0
        while True:
            try:
                batch = next(batches, None)
                records = [] if batch is None else batch.to_pylist()
            except (ArrowException, OSError, ValueError) as error:
                raise ValueError(
                    f"{self._path} is damaged: its records from {first} on cannot be read ({_one_line(error)}); make "
                    "or fetch it anew"
                ) from error
            if batch is None:
                return
            yield from records
            first += len(records)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]
