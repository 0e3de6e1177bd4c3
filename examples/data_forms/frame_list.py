"""A video as a list of its frames, with their rate: for sets that come as pictures.

From the repository's root:

    python examples/data_forms/frame_list.py runs/data_forms/frame_list
"""

from __future__ import annotations

import sys
from pathlib import Path

import av
from show import show

from longrl.io.jsonl import write_jsonl
from longrl.testing.example_clips import write_example_clips
from longrl.types import Prompt


def main(folder: str) -> Prompt:
    """Writes frames as JPEG files, a record that lists them, and shows what becomes of it."""
    record = write_example_clips(folder, num_videos=1)[0]
    frames = []
    with av.open(str(Path(folder, record["video"]))) as video:
        for number, frame in enumerate(video.decode(video=0)):
            frames.append(f"frame_{number:04d}.jpg")
            frame.to_image().save(Path(folder, frames[-1]))
    record |= {"video": frames, "fps": 2}  # or "frame_times": seconds, one for each frame
    file = write_jsonl(Path(folder, "frames.jsonl"), [record])
    return show(str(file), row_function="longrl.datamodules.rows.canonical_row")


if __name__ == "__main__":
    main(sys.argv[1])
