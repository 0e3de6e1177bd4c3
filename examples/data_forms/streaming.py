"""A hub data set whose first records are read as they arrive: the set is not downloaded.

A folder of parquet files stands in for the hub here; `owner/name` is found in the working folder first. From the
repository's root:

    python examples/data_forms/streaming.py runs/data_forms/streaming
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from show import show

from longrl.datamodules.loading.mixing import DataSource
from longrl.testing.example_clips import write_example_clips
from longrl.types import Prompt


def main(folder: str) -> Prompt:
    """Writes a set of two parquet files, streams six of its eight records and shows what becomes of the first."""
    shards = Path(folder, "owner", "clips", "data")
    shards.mkdir(parents=True, exist_ok=True)
    records = write_example_clips(folder, num_videos=2)
    for record in records:
        record["video"] = {"bytes": Path(folder, record["video"]).read_bytes(), "path": record["video"]}
    for number in range(2):
        table = pa.Table.from_pylist(records[4 * number : 4 * number + 4])
        parquet.write_table(table, shards / f"train-{number:05d}-of-00002.parquet")
    with contextlib.chdir(folder):
        # In YAML:  train: [{source: "owner/clips:train", streaming: true, max_records: 6}]
        source = DataSource("owner/clips:train", streaming=True, max_records=6)
        canonical = "longrl.datamodules.rows.canonical_row"
        return show([source], row_function=canonical, media_root="media")


if __name__ == "__main__":
    main(sys.argv[1])
