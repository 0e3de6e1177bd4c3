"""A stand-in for a folder of your own: 60 short videos, and a JSONL file with a question and its answer on each line.

No video is committed, so this draws some: coloured shapes that come one after the other, and a robot that visits a few
of them. From the repository's root:

    python examples/own_videos/make_clips.py --out runs/own_videos/clips
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from longrl.testing.example_clips import QUESTIONS_FILE, write_example_clips


def main(args: Sequence[str] | None = None) -> None:
    """Draws the videos and writes their questions."""
    parser = argparse.ArgumentParser(description="Draws short videos and writes questions about them.")
    parser.add_argument("--out", default="runs/own_videos/clips", help="folder to write")
    parser.add_argument("--num_videos", type=int, default=60, help="each with four questions")
    options = parser.parse_args(args)
    records = write_example_clips(options.out, options.num_videos)
    print(f"{options.num_videos} videos and {len(records)} questions: {options.out}/{QUESTIONS_FILE}")


if __name__ == "__main__":
    main()
