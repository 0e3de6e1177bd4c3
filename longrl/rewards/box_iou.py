"""Spatio-temporal grounding: how much boxes coincide, where they are stated for the right time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from longrl.rewards.answers import lenient_text, strict_text
from longrl.rewards.timed_boxes import TimedBox, parse_boxes
from longrl.types import Completion, Row

DEFAULT_TIME_TOLERANCE_S = 1.0
"""As Open-o3-Video gates its boxes; `row.metadata["time_tolerance_s"]` overrides."""


def box_iou(completion: Completion, row: Row) -> float:
    """IoU of the boxes in `<answer>` with those of `row.answer`, in [0, 1]; a box counts at its time only.

    The sum of the IoU of paired boxes over the number of pairs and of boxes without a partner on either side: vIoU of
    spatio-temporal grounding (arXiv:2001.06891), so that naming many boxes to be safe lowers the score. Partners are
    nearest in time and no further apart than the row's tolerance (Open-o3-Video, arXiv:2510.20579, takes 1 s); of
    several at one time those that coincide best. Where the ground truth has no times, boxes are paired in their order,
    as VideoChat-R1 (arXiv:2504.06958) compares tracks.

    Coordinates of answer and ground truth have the same units, whichever, or the row says how big a frame is in each:
    `box_size: [1280, 720]` in those of `row.answer`, and `said_box_size: [1000, 1000]` in those that the question asks
    for, such as Qwen3-VL's thousandths.

    Raises:
        ValueError: `row.answer` has no box, or times for some of them only.
    """
    return mean_box_iou(_said_boxes(strict_text(completion.text), row), gold_boxes(row), _tolerance_s(row))


def box_iou_lenient(completion: Completion, row: Row) -> float:
    """As `box_iou`; without an `<answer>` the text after the thinking is read instead."""
    return mean_box_iou(_said_boxes(lenient_text(completion.text), row), gold_boxes(row), _tolerance_s(row))


def gold_boxes(row: Row) -> list[TimedBox]:
    """The boxes of `row.answer`."""
    boxes = parse_boxes(row.answer)
    num_timed = sum(box.time_s is not None for box in boxes)
    if not boxes or any(_area(box) <= 0 for box in boxes) or num_timed not in (0, len(boxes)):
        raise ValueError(
            f"row {row.id!r}: a box_iou answer must hold boxes [x1, y1, x2, y2] with an area, all with a time or none, "
            f'got {row.answer!r}; write each as {{"time": 1.0, "bbox_2d": [x1, y1, x2, y2]}}'
        )
    return boxes


def mean_box_iou(said: Sequence[TimedBox], golds: Sequence[TimedBox], tolerance_s: float) -> float:
    """Sum of the IoU of partners over the number of pairs and of boxes without a partner; see `box_iou`.

    Args:
        said: boxes of an answer.
        golds: of the ground truth, in the same units, with a time each or none.
        tolerance_s: between partners.
    """
    # 1. Who may be partners, the nearest in time first.
    candidates: list[tuple[float, float, int, int]] = []
    order = sorted((box.time_s, index) for index, box in enumerate(said) if box.time_s is not None)
    times = [time for time, _ in order]
    for gold_index, gold in enumerate(golds):
        near = [(0.0, gold_index)] if gold_index < len(said) else []
        if gold.time_s is not None:
            first = bisect_left(times, gold.time_s - tolerance_s - 1e-9)
            last = bisect_right(times, gold.time_s + tolerance_s + 1e-9)
            near = [(round(abs(time_s - gold.time_s), 6), index) for time_s, index in order[first:last]]
        for distance_s, index in near:
            candidates.append((distance_s, -intersection_over_union(said[index], gold), gold_index, index))
    # 2. Pairs, each box once.
    total, free_golds, free_said = 0.0, set(range(len(golds))), set(range(len(said)))
    for _, negative_iou, gold_index, index in sorted(candidates):
        if gold_index in free_golds and index in free_said:
            free_golds.remove(gold_index)
            free_said.remove(index)
            total -= negative_iou
    return total / (len(golds) + len(free_said))


def intersection_over_union(first: TimedBox, second: TimedBox) -> float:
    """Area of the intersection over that of the union; 0.0 for a box without an area."""
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    if width <= 0 or height <= 0 or _area(first) <= 0 or _area(second) <= 0:
        return 0.0
    overlap = width * height
    return overlap / (_area(first) + _area(second) - overlap)


def _area(box: TimedBox) -> float:
    return max(0.0, box.x2 - box.x1) * max(0.0, box.y2 - box.y1)


def _said_boxes(text: str, row: Row) -> list[TimedBox]:
    """The boxes of an answer in the units of `row.answer`."""
    boxes = parse_boxes(text)
    size, said_size = row.metadata.get("box_size"), row.metadata.get("said_box_size")
    if said_size is None:
        return boxes
    if size is None:
        raise ValueError(
            f"row {row.id!r} has said_box_size={said_size} but no box_size; add the width and height of a frame in the "
            "units of its answer to its metadata"
        )
    x_scale, y_scale = size[0] / said_size[0], size[1] / said_size[1]
    return [TimedBox(b.x1 * x_scale, b.y1 * y_scale, b.x2 * x_scale, b.y2 * y_scale, b.time_s) for b in boxes]


def _tolerance_s(row: Row) -> float:
    return float(row.metadata.get("time_tolerance_s", DEFAULT_TIME_TOLERANCE_S))
