"""Videos within a parquet file, as hub data sets hold them: `{"bytes": ..., "path": ...}`.

They are written below `data.media_root`, in `.videos`, each once. From the repository's root:

    python examples/data_forms/video_bytes.py runs/data_forms/video_bytes
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet
from show import show

from longrl.testing.example_clips import write_example_clips
from longrl.types import Prompt


def main(folder: str) -> Prompt:
    """Writes a parquet file that holds its videos, and shows what becomes of its first record."""
    records = write_example_clips(folder, num_videos=2)
    for record in records:
        record["video"] = {"bytes": Path(folder, record["video"]).read_bytes(), "path": record["video"]}
    file = Path(folder, "train.parquet")
    parquet.write_table(pa.Table.from_pylist(records), file)
    return show(str(file), row_function="longrl.datamodules.rows.canonical_row")


if __name__ == "__main__":
    main(sys.argv[1])
