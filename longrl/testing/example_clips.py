"""Short videos with questions in the form in which users write their own, drawn by code: no video is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrl.io.jsonl import write_jsonl
from longrl.testing.drawing import write_video
from longrl.testing.stories import LETTERS
from longrl.testing.synthetic_videos import SyntheticConfig, make_records

QUESTIONS_FILE = "questions.jsonl"
SIZE = 56
"""Height and width of the videos in pixels: a frame is four tokens of the demo's model."""


def write_example_clips(folder: str | Path, num_videos: int, questions_per_video: int = 4) -> list[dict[str, Any]]:
    """Draws videos of 16 to 20 s into a folder, with `questions.jsonl` beside them.

    Args:
        folder: made if missing.
        num_videos: `train_000000.mp4` and so on.
        questions_per_video: 1 to 4.

    Returns:
        The records: `id`, `video`, `question`, `options`, `answer`, `reasoning` and `problem_type`, as
        `longrl.datamodules.rows.canonical_row` reads them.
    """
    folder = Path(folder)
    config = SyntheticConfig(
        num_train_videos=num_videos,
        num_eval_videos=0,
        questions_per_video=questions_per_video,
        size=SIZE,
        fps=2,
        scene_s=4.0,
    )
    made, clips = make_records(config)
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        write_video(folder / Path(clip.path).name, clip, config)
    records = [_own_record(record) for record in made["train"]]
    write_jsonl(folder / QUESTIONS_FILE, records)
    return records


def _own_record(record: dict[str, Any]) -> dict[str, Any]:
    """A generated record with its options apart from the question, and the right one's wording as the answer."""
    question, *lines = record["problem"].split("\n")
    options = [line.partition(". ")[2] for line in lines]
    letter = record["answer"].removeprefix("<answer>")[0]
    return {
        "id": f"q{record['problem_id']}",
        "video": Path(record["videos"]).name,
        "question": question,
        "options": options,
        "answer": options[LETTERS.index(letter)],
        "reasoning": record["reasoning"],
        "problem_type": record["problem_type"],
    }
