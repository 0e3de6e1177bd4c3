"""How many frames until a question is shown the event that it is about? Found events against frames, by selection.

Long videos show an event of two seconds somewhere, which a question describes (selection_videos.py). Each selection
chooses so many frames of each; an event is found if a chosen frame shows it. Similarity is that of a small CLIP, which
this bench trains on pictures and captions that show no event's object (selection_clip.py).

    python bench/selection.py --json bench/results/selection.json

also writes selection.svg beside the JSON: found against frames, and against tokens.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import Row, parse_arguments, report
from selection_clip import write_clip
from selection_plot import plot_found
from selection_videos import EVENT_S, PlantedVideo, write_video

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.selection import Coverage, FrameSelection, KeyFrames, Motion, Scenes, Similarity
from longrl.datamodules.selection.frame_selection import forget
from longrl.evaluation.scores import wilson_interval
from longrl.io.atomic import atomic_write
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.tiny import tiny_qwen2_5_vl
from longrl.types import Row as Question

UNIFORM = "uniform"
OVERVIEW = 8
"""Frames of the video before its details."""
TARGETS = (0.5, 0.9)
"""Shares of found events that the notes compare frames at."""


@dataclass(frozen=True)
class Sizes:
    """How much is done."""

    videos: int = 104
    seconds: int = 256
    steps: int = 400
    frames: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    timed: int = 3
    """Videos whose frames are decoded for the clock, with nothing kept of before; of the others they are only named."""


class AllStored:
    """Knows the features of every video, so that a prompt's frames are chosen and not decoded."""

    def has(self, key: str) -> bool:
        """True."""
        return True


FULL = Sizes()
QUICK = Sizes(videos=8, seconds=64, steps=40, frames=(4, 16), timed=1)


def main(argv: Sequence[str] | None = None, sizes: Sizes = FULL) -> list[Row]:
    """Trains, draws and counts; `--quick` shows that it runs, and finds little with a CLIP of so few steps."""
    arguments = parse_arguments(__doc__ or "", argv)
    sizes = QUICK if arguments.quick else sizes
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        clip = write_clip(Path(folder, "clip"), sizes.steps)
        seconds = time.perf_counter() - start
        videos = [write_video(Path(folder, f"{n}.mp4"), sizes.seconds, f"video {n}") for n in range(sizes.videos)]
        model = tiny_qwen2_5_vl(Path(folder, "vl"))
        family = Qwen2_5_VLFamily(str(model), min_pixels=28 * 28, max_pixels=56 * 56)
        kinds = [Shown(name, one, n, family) for name, one in selections(str(clip)).items() for n in sizes.frames]
        for number, video in enumerate(videos):  # of one after the other: its packets are read once
            for kind in kinds:
                kind.ask(video, is_timed=number < sizes.timed)
        rows = [kind.row() for kind in kinds]
    if arguments.json:
        image = io.StringIO()
        plot_found(rows, f"{sizes.videos} videos of {sizes.seconds} s, an event of {EVENT_S} s").savefig(
            image, format="svg", metadata={"Date": None}
        )
        atomic_write(arguments.json.with_suffix(".svg"), image.getvalue())
    report(__file__, arguments, rows, [f"the CLIP was trained in {seconds:.0f} s", *comparisons(rows)])
    return rows


def selections(clip: str) -> dict[str, FrameSelection | None]:
    """What is compared, by name."""
    similar = Similarity(folder=clip, min_gap_s=float(EVENT_S))
    return {
        UNIFORM: None,
        "key_frames": KeyFrames(),
        "scenes": Scenes(),
        "motion": Motion(),
        "similarity": similar,
        "coverage": Coverage(folder=clip),
        "overview_and_details": replace(similar, detail_frames=1, overview_pixels=28 * 28),
    }


class Shown:
    """What a selection of so many frames shows of all videos.

    Args:
        name: of the selection.
        selection: None is uniform sampling.
        count: frames; of a video with details these are `count`, behind a few small frames.
        family: renders prompts.
    """

    def __init__(self, name: str, selection: FrameSelection | None, count: int, family: Qwen2_5_VLFamily) -> None:
        sampling = VideoSampling(fps=None, num_frames=count, min_frames=1)
        self.frames = count
        if selection is not None and selection.detail_frames:
            selection = replace(selection, detail_frames=count)
            sampling = replace(sampling, num_frames=OVERVIEW)
            self.frames = OVERVIEW + count
        self.name = name
        self.family = family
        self.whole = RowRenderer(family, sampling, selection=selection)
        self.named = replace(self.whole, stored=AllStored())
        self.found: list[bool] = []
        self.seconds: list[float] = []
        self.tokens = 0

    def ask(self, video: PlantedVideo, is_timed: bool) -> None:
        """Renders the question of a video: by the clock, all of it from the file on."""
        row = Question(video.path.stem, video.question, "A", videos=(str(video.path),))
        if is_timed:
            forget()
            start = time.perf_counter()
            prompt = self.whole(row)
            self.seconds.append(time.perf_counter() - start)
        else:
            prompt = self.named(row)
        self.found.append(video.is_shown([time_s for times in prompt.frame_times for time_s in times]))
        self.tokens = sum(self.family.num_features(item) for item in prompt.media)

    def row(self) -> Row:
        """Found events, and what the frames of a video cost."""
        low, high = wilson_interval(sum(self.found), len(self.found))
        return {
            "selection": self.name,
            "frames": self.frames,
            "found": round(statistics.fmean(self.found), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "n": len(self.found),
            "decode_s": round(statistics.median(self.seconds), 4),
            "tokens": self.tokens,
        }


def comparisons(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many frames each selection needs for a share of the events, against uniform sampling."""
    names = dict.fromkeys(str(row["selection"]) for row in rows)
    notes = []
    for target in TARGETS:
        needed = {name: fewest_frames(rows, name, target) for name in names}
        said = ", ".join(f"{name} {count or 'more'}" for name, count in needed.items())
        notes.append(f"frames to find {target:.0%}: {said}")
    return notes


def fewest_frames(rows: Sequence[Mapping[str, Any]], name: str, target: float) -> int | None:
    """The least number of frames at which a selection finds a share of the events; None if at none."""
    enough = [row for row in rows if row["selection"] == name and row["found"] >= target]
    return min((row["frames"] for row in enough), default=None)


if __name__ == "__main__":
    main()
