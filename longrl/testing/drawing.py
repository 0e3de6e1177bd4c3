"""Stories as pixels: frames drawn with NumPy, H.264 files written with PyAV."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from longrl.testing.stories import COLORS, Scene, Story

if TYPE_CHECKING:
    from longrl.testing.synthetic_videos import SyntheticConfig

MOTION_FRAMES = 8
"""An object circles once around its position in so many frames."""

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Clip:
    """A video still to be drawn."""

    path: str
    """Relative to the dataset's folder."""
    story: Story
    seed: str
    """Decides jitter and background."""


def shape_mask(shape: str, radius: int) -> NDArray[np.bool_]:
    """[2r+1, 2r+1] True where the shape is; all four have about the same extent."""
    axis = np.linspace(-1.0, 1.0, 2 * radius + 1)
    y, x = axis[:, None], axis[None, :]
    masks = {
        "circle": x**2 + y**2 <= 1.0,
        "square": (abs(x) <= 0.92) & (abs(y) <= 0.92),
        "triangle": abs(x) <= (y + 1.0) / 2,
        "cross": (abs(x) <= 0.3) | (abs(y) <= 0.3),
    }
    return masks[shape]


def draw_background(rng: Random, size: int) -> Image:
    """[size, size, 3] dark grey with a faint slope; level, tint and slope vary from video to video."""
    level = rng.uniform(38, 68) + np.array([rng.uniform(-5, 5) for _ in range(3)])
    axis = np.linspace(-1.0, 1.0, size)
    slope = rng.uniform(-7, 7) * axis[:, None] + rng.uniform(-7, 7) * axis[None, :]
    return (level + slope[..., None]).round().astype(np.uint8)


def draw_scene(scene: Scene, background: Image, rng: Random) -> Iterator[Image]:
    """The `MOTION_FRAMES` different frames of a scene: its object on a small circle around a jittered position."""
    size = len(background)
    unit = size / 112
    radius = round(rng.uniform(21.0, 24.0) * unit)
    mask = shape_mask(scene.shape, radius)
    axis = np.linspace(-1.0, 1.0, 2 * radius + 1)
    robot = np.hypot(axis[:, None], axis[None, :])
    row, col = (
        size // 4 + (size // 2) * (word in scene.position) + rng.uniform(-1.5, 1.5) * unit
        for word in ("bottom", "right")
    )
    turn = rng.uniform(0, 2 * math.pi)
    for step in range(MOTION_FRAMES):
        angle = turn + 2 * math.pi * step / MOTION_FRAMES
        frame = background.copy()
        rows = _extent(row + unit * math.sin(angle), radius, size)
        patch = frame[rows, _extent(col + unit * math.cos(angle), radius, size)]
        patch[mask] = COLORS[scene.color]
        if scene.visited:
            patch[robot <= 0.42] = (255, 140, 0)
            patch[robot <= 0.3] = (0, 0, 0)
        yield frame


def _extent(center: float, radius: int, size: int) -> slice:
    """The 2r+1 rows or columns around `center`, moved into the picture where rounding leads out of it (small sizes)."""
    start = min(max(round(center) - radius, 0), size - 2 * radius - 1)
    return slice(start, start + 2 * radius + 1)


def write_video(path: Path, clip: Clip, config: SyntheticConfig) -> None:
    """Draw and encode one clip as H.264 in mp4, frame by frame: memory does not grow with its length."""
    import av

    rng = Random(clip.seed)
    background = draw_background(rng, config.size)
    frames_per_scene = round(config.scene_s * config.fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=config.fps)
        stream.width = stream.height = config.size
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20", "g": "64", "threads": "1"}
        for number, scene in enumerate(clip.story.scenes):
            images = draw_scene(scene, background, rng)
            drawn = [av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p") for image in images]
            for step in range(frames_per_scene):
                frame = drawn[step % MOTION_FRAMES]
                frame.pts = number * frames_per_scene + step
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
