"""Videos whose frames, and outputs whose scores, are compared with those of released code (`peer_figures`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Video(NamedTuple):
    """A video of a constant rate."""

    num_frames: int
    fps: str
    """A fraction, as containers have it."""


class Ask(NamedTuple):
    """So many frames, or so many per second and at most so many."""

    count: int | None = None
    rate: float | None = None
    most: int | None = None


VIDEOS = [
    # a number of frames
    (Video(31, "30"), Ask(8)),
    (Video(100, "25"), Ask(8)),
    (Video(17, "10"), Ask(4)),
    (Video(900, "30"), Ask(32)),
    (Video(901, "30000/1001"), Ask(32)),
    (Video(899, "24000/1001"), Ask(64)),
    (Video(5_000, "50"), Ask(16)),
    (Video(129, "24"), Ask(128)),
    (Video(128, "24"), Ask(128)),
    (Video(9, "3"), Ask(16)),
    (Video(108_000, "30"), Ask(512)),
    (Video(86_313, "24000/1001"), Ask(256)),
    (Video(3_600, "1"), Ask(768)),
    (Video(1_201, "60000/1001"), Ask(2)),
    (Video(7_777, "25"), Ask(100)),
    # a rate, and the most there may be
    (Video(25, "25"), Ask(rate=2.0, most=768)),
    (Video(300, "30"), Ask(rate=2.0, most=768)),
    (Video(327, "30"), Ask(rate=2.0, most=768)),
    (Video(327, "30"), Ask(rate=1.0, most=768)),
    (Video(1_798, "30000/1001"), Ask(rate=1.0, most=64)),
    (Video(5_394, "30000/1001"), Ask(rate=1.0, most=256)),
    (Video(4_321, "24000/1001"), Ask(rate=0.5, most=128)),
    (Video(2_500, "25"), Ask(rate=0.3, most=32)),
    (Video(45_000, "25"), Ask(rate=1.0, most=512)),
    (Video(108_000, "30"), Ask(rate=2.0, most=2048)),
    (Video(90, "30"), Ask(rate=4.0, most=16)),
    (Video(109, "10"), Ask(rate=4.0, most=2048)),
    (Video(600, "12.5"), Ask(rate=2.0, most=768)),
    (Video(3_000, "60"), Ask(rate=7.0, most=1024)),
    (Video(40, "1"), Ask(rate=0.25, most=768)),
]


class Output(NamedTuple):
    """What a model said to a question with options, and whether a reader takes it for the right one."""

    text: str
    options: dict[str, str]
    gold: str
    right: bool


def read_outputs() -> list[Output]:
    """200 outputs of `tests/rewards/answers.jsonl`, of the part that was given: every answer to a question, every
    template with one of its letters filled in, and the first ones with a wrong letter."""
    path = Path(__file__).parents[1] / "rewards" / "answers.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    given = [case for case in cases if case.get("origin", "given") == "given"]
    outputs = [
        Output(case["answer_text"], case["options"], case["gold"], bool(case["right"]))
        for case in given
        if case["task"] == "multiple_choice"
    ]
    templates = [case for case in given if case["task"] == "letter_symmetry"]
    for turn in (0, 1):
        for index, case in enumerate(templates):
            gold, letter = "ABCD"[index % 4], "ABCD"[(index + turn) % 4]
            outputs.append(Output(case["template"].replace("{L}", letter), case["options"], gold, turn == 0))
    return outputs[:200]


OUTPUTS = read_outputs()
