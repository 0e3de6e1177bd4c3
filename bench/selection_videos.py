"""Long videos with a short event that a question describes, and pictures with captions to learn its words from.

A video has scenes of 5 to 11 seconds, each with one object (a colour, a shape, a corner). In one scene another object
takes its place for two seconds: the event. In half of the others such an object does too, which no question is about,
so that a change alone says little. What an event shows, colour, shape and corner together, no training picture shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor

from longrl.testing.drawing import MOTION_FRAMES, Image, draw_background, draw_scene
from longrl.testing.stories import COLORS, POSITIONS, SHAPES, Scene

FPS = 4
SCENE_S = (5, 11)
EVENT_S = 2
SIZE = 64
"""Height and width of a picture in pixels."""
TEMPLATES = (
    "a {color} {shape} at the {position}",
    "the {position} has a {color} {shape}",
    "what is at the {position} ? a {color} {shape}",
    "a {shape} that is {color} is there at the {position}",
)
QUESTION = "What comes right after the {color} {shape} is there at the {position}?"
EVERY = [Scene(color, shape, place, False) for color, shape, place in itertools.product(COLORS, SHAPES, POSITIONS)]
EVENTS = Random("events").sample(EVERY, 24)
"""What events show."""
LEARNT = [scene for scene in EVERY if scene not in EVENTS]
"""What pictures of the training show."""


@dataclass(frozen=True)
class PlantedVideo:
    """A video, the question of it, and when its event is on show."""

    path: Path
    question: str
    event_s: tuple[float, float]

    def is_shown(self, times: list[float]) -> bool:
        """True if a frame of these times shows the event."""
        return any(self.event_s[0] <= time_s < self.event_s[1] for time_s in times)


def words_of(scene: Scene) -> dict[str, str]:
    """What templates name."""
    return {"color": scene.color, "shape": scene.shape, "position": scene.position}


def all_words() -> set[str]:
    """Words of all captions and questions, in lower case."""
    texts = [template.format(**words_of(scene)) for template in (*TEMPLATES, QUESTION) for scene in EVERY]
    return {word for text in texts for word in text.lower().replace("?", " ").split()}


def draw_pair(rng: Random) -> tuple[Tensor, Scene, str]:
    """A picture [SIZE, SIZE, 3] of the training, what it shows, and its caption."""
    scene = rng.choice(LEARNT)
    pictures = list(draw_scene(scene, draw_background(rng, SIZE), rng))
    picture = torch.from_numpy(np.ascontiguousarray(rng.choice(pictures)))
    return picture, scene, rng.choice(TEMPLATES).format(**words_of(scene))


def write_video(path: Path, seconds: int, seed: str) -> PlantedVideo:
    """Draws and encodes a video."""
    import av

    # 1. A scene each 8 seconds, what flashes in it, and when.
    rng = Random(seed)
    event = rng.choice(EVENTS)
    edges = scene_edges(rng, seconds * FPS)
    scenes = [rng.choice(LEARNT) for _ in edges[1:]]
    place = rng.randrange(len(scenes))
    others = rng.sample([index for index in range(len(scenes)) if index != place], (len(scenes) - 1) // 2)
    flashes = {index: rng.choice(LEARNT) for index in others} | {place: event}
    lasts = {index: edges[index + 1] - FPS * EVENT_S - 1 for index in sorted(flashes)}
    starts = {index: rng.randint(edges[index] + 1, last) for index, last in lasts.items()}

    # 2. Its frames.
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "20", "g": "32", "threads": "1"}
        background = draw_background(rng, SIZE)
        for index, scene in enumerate(scenes):
            numbers = range(edges[index], edges[index + 1])
            pictures = scene_pictures(scene, flashes.get(index), numbers, starts.get(index, 0), background, rng)
            for number, picture in zip(numbers, pictures, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    start_s = starts[place] / FPS
    return PlantedVideo(path, QUESTION.format(**words_of(event)), (start_s, start_s + EVENT_S))


def scene_edges(rng: Random, num_frames: int) -> list[int]:
    """Numbers of the frames at which scenes begin, and of all: uneven lengths, so that no rate of frames keeps step."""
    edges = [0]
    while num_frames - edges[-1] > SCENE_S[1] * FPS:
        longest = min(SCENE_S[1] * FPS, num_frames - edges[-1] - SCENE_S[0] * FPS)
        edges.append(edges[-1] + rng.randint(SCENE_S[0] * FPS, longest))
    return [*edges, num_frames]


def scene_pictures(
    scene: Scene, flash: Scene | None, numbers: range, start: int, background: Image, rng: Random
) -> Iterator[Image]:
    """The frames of a scene, [SIZE, SIZE, 3] each, with what flashes from one of them on."""
    usual = list(draw_scene(scene, background, rng))
    other = usual if flash is None else list(draw_scene(flash, background, rng))
    for number in numbers:
        is_flash = start <= number < start + EVENT_S * FPS
        yield (other if is_flash else usual)[number % MOTION_FRAMES]
