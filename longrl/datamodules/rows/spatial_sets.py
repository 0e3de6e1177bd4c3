"""Row functions of benchmarks of space: where things are, how large and how far, from a video of the place."""

from __future__ import annotations

from longrl.datamodules.rows.published import video_row
from longrl.datamodules.rows.question_rows import given_options, lettered_options, text_field
from longrl.datamodules.rows.sources import Record
from longrl.types import Row

VSI_NUMBERS = ("object_abs_distance", "object_counting", "object_size_estimation", "room_size_estimation")
"""Question types of VSI-Bench that are answered by a number."""
VSI_WANTS = {
    True: "Please answer the question using a single word or phrase.",
    False: "Answer with the option's letter from the given choices directly.",
}
"""What its authors want of a question with a number, and of one with options."""


def vsi_bench_row(record: Record, index: int, media_root: str | None = None) -> Row:
    """A question of VSI-Bench (arXiv:2412.14171): options with letters, or a number that is judged by degrees (`mra`).

    The category is its question type, of which three are one of the benchmark's eight tasks; the video is
    `dataset/scene_name.mp4`.
    """
    kind, dataset = text_field(record, "question_type", index), text_field(record, "dataset", index)
    question, scene = text_field(record, "question", index), text_field(record, "scene_name", index)
    is_number = kind in VSI_NUMBERS
    options = None if is_number else given_options(record.get("options") or (), record, index)
    asked = question if options is None else "\n".join([question, "Options:", *lettered_options(options)])
    fields = {
        "options": options,
        "answer": text_field(record, "ground_truth", index),
        "task": "mra" if is_number else "multiple_choice",
        "category": kind,
        "metadata": {"dataset": dataset, "asked": asked, "instruction": VSI_WANTS[is_number]},
    }
    return video_row(record, index, media_root, f"{dataset}/{scene}.mp4", fields)
