"""Long videos with known stories: real H.264 files and records in the LongVideo-Reason schema, all from one seed.

A video is a story of scenes. Each shows one object (a colour and a shape) in one quadrant; in some a robot, a black
disc with an orange rim, sits on the object. The robot collects: it visits all objects with one attribute and no others.
Four questions are asked of a story. What a reader of the TEXT alone can score is 1 in 4 by construction:

- the order of the scenes is a uniform permutation, so every object of the video is equally often the right one;
- positions are independent and uniform;
- goals offer two colours and two shapes, and the goal is as often a colour as a shape;
- plots offer two pairs that share one object, each in both orders;
- letters are dealt out evenly per split and category, whatever the content.

    python -m longrl.datamodules.synthetic --out data/synthetic --num_train_videos 400 --num_eval_videos 60

writes `train.jsonl`, `eval.jsonl`, `pretrain.jsonl` (if asked for), `manifest.json` and `videos/`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

COLORS = {
    "red": (215, 35, 35),
    "green": (30, 165, 50),
    "blue": (40, 85, 235),
    "yellow": (240, 220, 40),
    "purple": (155, 50, 200),
    "white": (245, 245, 245),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
"""Singular -> plural."""
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
CATEGORIES = ("temporal", "spatial", "goal and purpose", "plot and narrative")
LETTERS = "ABCD"
NOTHING = "nothing"

VERSION = 2
"""Raise it when the same config gives other records or pixels, so that old folders are made again."""
MOTION_FRAMES = 8
"""An object circles once around its place in so many frames."""

Image = NDArray[np.uint8]
Record = dict[str, Any]


@dataclass(frozen=True)
class SyntheticConfig:
    """What to generate. Equal configs give equal records and equal decoded pixels."""

    num_train_videos: int = 400
    num_eval_videos: int = 60
    num_pretrain_videos: int = 0
    """Videos with a description instead of questions, for the demo's base model; they share no story with the rest."""
    min_scenes: int = 4
    max_scenes: int = 5
    scene_s: float = 8.0
    """Seconds each scene lasts."""
    fps: int = 4
    size: int = 112
    """Height and width in pixels."""
    questions_per_video: int = 4
    """1 to 4, each of another category; fewer than 4 rotate through the categories from video to video."""
    lookups_per_video: int = 2
    """Rows per pretraining video that list options."""
    readings_per_video: int = 1
    """Rows per pretraining video that tell of a story in text."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: value for name, value in asdict(self).items() if name.startswith("num_") or "s_per_" in name}
        if min(counts.values()) < 0:
            raise ValueError(f"the numbers of videos and rows must be at least 0, got {counts}")
        num_objects = len(COLORS) * len(SHAPES)
        if not 4 <= self.min_scenes <= self.max_scenes <= num_objects:
            raise ValueError(
                f"scenes must satisfy 4 <= min_scenes <= max_scenes <= {num_objects}, as the objects of a video are "
                f"distinct, got {self.min_scenes} and {self.max_scenes}; for longer videos raise scene_s"
            )
        if not 1 <= self.questions_per_video <= len(CATEGORIES):
            raise ValueError(f"questions_per_video must be 1 to {len(CATEGORIES)}, got {self.questions_per_video}")
        if self.fps < 1 or round(self.scene_s * self.fps) < 1:
            raise ValueError(f"a scene needs at least one frame, got scene_s={self.scene_s} and fps={self.fps}")
        if self.size < 32 or self.size % 2:
            raise ValueError(f"size must be even (4:2:0 chroma) and at least 32, got {self.size}")

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the output."""
        return hashlib.sha256(json.dumps([VERSION, asdict(self)]).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- stories


@dataclass(frozen=True)
class Scene:
    """One object in one place, with or without the robot."""

    color: str
    shape: str
    position: str
    visited: bool

    @property
    def name(self) -> str:
        """For example `red circle`."""
        return f"{self.color} {self.shape}"

    @property
    def attributes(self) -> tuple[str, str]:
        """What a collector may look for here, for example `("red objects", "circles")`."""
        return f"{self.color} objects", SHAPES[self.shape]


@dataclass(frozen=True)
class Story:
    """The scenes of one video in order, and what its robot looks for."""

    scenes: tuple[Scene, ...]
    goal: str


def describe(story: Story) -> str:
    """The scene listing: all that is visible and nothing else.

    Example:
        `red circle top left. blue square bottom right, robot. green cross top left, robot.`
    """
    return " ".join(f"{s.name} {s.position}{', robot' if s.visited else ''}." for s in story.scenes)


def sample_story(rng: Random, *, num_scenes: int) -> Story:
    """Draw a story whose goal cannot be told from the objects alone.

    Objects are redrawn until at least two attributes could be the goal, one of them of the kind (colour or shape) drawn
    beforehand. So a colour is the goal as often as a shape, and all colours and all shapes are alike.
    """
    kind = rng.randrange(2)
    objects = [(color, shape) for color in COLORS for shape in SHAPES]
    while True:
        scenes = [Scene(color, shape, rng.choice(POSITIONS), False) for color, shape in rng.sample(objects, num_scenes)]
        goals = possible_goals(scenes)
        of_kind = [goal for goal in goals if any(scene.attributes[kind] == goal for scene in scenes)]
        if len(goals) > 1 and of_kind:
            goal = rng.choice(of_kind)
            return Story(tuple(Scene(s.color, s.shape, s.position, goal in s.attributes) for s in scenes), goal)


def possible_goals(scenes: Iterable[Scene]) -> list[str]:
    """Attributes of at least two but not all objects. Distinct objects that share one attribute differ in the other."""
    scenes = list(scenes)
    counts: dict[str, int] = {}
    for scene in scenes:
        for attribute in scene.attributes:
            counts[attribute] = counts.get(attribute, 0) + 1
    return [attribute for attribute, count in counts.items() if 2 <= count < len(scenes)]


def sample_stories(config: SyntheticConfig, split: str, count: int, taken: set[tuple[Scene, ...]]) -> list[Story]:
    """Draw `count` stories of a split that occur nowhere in `taken`, and add them to it."""
    rng = Random(f"{config.seed}/{split}/stories")
    stories: list[Story] = []
    while len(stories) < count:
        story = sample_story(rng, num_scenes=rng.randint(config.min_scenes, config.max_scenes))
        if story.scenes not in taken:
            taken.add(story.scenes)
            stories.append(story)
    return stories


# -------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True)
class Question:
    """A question before its options have letters."""

    text: str
    correct: str
    distractors: list[str]
    deduction: str
    """The last step of the reasoning; it ends with the correct option, behind which its letter is put."""


def ask_temporal(story: Story, rng: Random) -> Question:
    """What comes right before or after an object; the options are other objects of the video.

    Four scenes leave only three other objects: `nothing` is the fourth option then, and right in one case of four. The
    object asked for is never an option, as it could be ruled out without the video.
    """
    word, step = rng.choice((("after", 1), ("before", -1)))
    order = [scene.name for scene in story.scenes][::step]
    open_end = len(order) == 4
    asked = rng.randrange(len(order) if open_end else len(order) - 1)
    following = [*order[asked + 1 :], NOTHING] if open_end else order[asked + 1 :]
    others = order[:asked] + following[1:]
    comes = following[0] if following[0] == NOTHING else f"the {following[0]}"
    return Question(
        text=f"What comes right {word} the {order[asked]}?",
        correct=following[0],
        distractors=rng.sample(others, 3),
        deduction=f"{word.capitalize()} the {order[asked]} comes {comes}.",
    )


def ask_spatial(story: Story, rng: Random) -> Question:
    """Where an object is; the options are always the four quadrants."""
    scene = rng.choice(story.scenes)
    distractors = [position for position in POSITIONS if position != scene.position]
    text, deduction = f"Where is the {scene.name}?", f"The {scene.name} is {scene.position}."
    return Question(text, scene.position, rng.sample(distractors, 3), deduction)


def ask_goal(story: Story, rng: Random) -> Question:
    """What the robot looks for: two colours and two shapes, where possible such as other objects share."""
    visited = " and ".join(scene.name for scene in story.scenes if scene.visited)
    kinds = [[f"{color} objects" for color in COLORS], list(SHAPES.values())]
    own, other = kinds if story.goal in kinds[0] else kinds[::-1]
    own = [attribute for attribute in own if attribute != story.goal]
    distractors = _most_tempting(own, story, rng)[:1] + _most_tempting(other, story, rng)[:2]
    return Question(
        text="What does the robot look for?",
        correct=story.goal,
        distractors=rng.sample(distractors, 3),
        deduction=f"The robot is at {visited}. It looks for {story.goal}.",
    )


def _most_tempting(attributes: list[str], story: Story, rng: Random) -> list[str]:
    """Attributes that could be goals of this video first, then those of unvisited objects, of visited ones, others."""
    goals = possible_goals(story.scenes)
    unvisited = {attribute for scene in story.scenes if not scene.visited for attribute in scene.attributes}
    visited = {attribute for scene in story.scenes if scene.visited for attribute in scene.attributes}

    def rank(attribute: str) -> tuple[bool, bool, bool]:
        return attribute not in goals, attribute not in unvisited, attribute not in visited

    return sorted(rng.sample(attributes, len(attributes)), key=rank)


def ask_plot(story: Story, rng: Random) -> Question:
    """How the story begins and ends: the pair, another that shares one of its objects, and both reversed."""
    names = [scene.name for scene in story.scenes]
    ends = (names[0], names[-1])
    pair = (rng.choice(ends), rng.choice(names[1:-1]))
    options = [" to ".join(p) for p in (ends, ends[::-1], pair, pair[::-1])]
    text, deduction = "How does the story begin and end?", f"The story goes {options[0]}."
    return Question(text, options[0], rng.sample(options[1:], 3), deduction)


ASK: dict[str, Callable[[Story, Random], Question]] = dict(
    zip(CATEGORIES, (ask_temporal, ask_spatial, ask_goal, ask_plot), strict=True)
)


# ---------------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Clip:
    """A video still to be drawn."""

    path: str
    """Relative to the dataset's folder."""
    story: Story
    seed: str
    """Decides jitter and background."""


def deal_letters(count: int, rng: Random) -> Iterator[str]:
    """`count` letters in random order, each as often as any other up to one."""
    letters = [LETTERS[i % len(LETTERS)] for i in range(count)]
    rng.shuffle(letters)
    return iter(letters)


def write_options(question: str, correct: str, distractors: list[str], letter: str) -> str:
    """The question line and four option lines, with the correct option at `letter`."""
    options = list(distractors)
    options.insert(LETTERS.index(letter), correct)
    return "\n".join([question, *(f"{name}. {option}" for name, option in zip(LETTERS, options, strict=True))])


def make_split(config: SyntheticConfig, split: str, stories: list[Story]) -> tuple[list[Record], list[Clip]]:
    """Questions about `stories`, `questions_per_video` for each, and the clips they need. Nothing is drawn."""
    rng = Random(f"{config.seed}/{split}/questions")
    clips = make_clips(config, split, stories)
    num = config.questions_per_video
    asked = [(clip, CATEGORIES[(i * num + j) % len(CATEGORIES)]) for i, clip in enumerate(clips) for j in range(num)]
    letters = _letters_by_category([category for _, category in asked], rng)
    records = []
    for index, (clip, category) in enumerate(asked):
        question, letter = ASK[category](clip.story, rng), next(letters[category])
        records.append(
            {
                "problem_id": index,
                "problem": write_options(question.text, question.correct, question.distractors, letter),
                "data_type": "video",
                "problem_type": category,
                "reasoning": f"{describe(clip.story)} {question.deduction.removesuffix('.')} {letter}.",
                "videos": clip.path,
                "answer": f"<answer>{letter}</answer>",
            }
        )
    return records, clips


def make_pretrain(config: SyntheticConfig, stories: list[Story]) -> tuple[list[Record], list[Clip]]:
    """Rows that teach a base model to describe videos and to read options, and neither the questions nor reasoning.

    `description` rows have a video of one or more scenes of a story and their listing as answer; `lookup` rows have no
    video and four options, as the categories offer them, to be told with their letters in random order.
    """
    rng = Random(f"{config.seed}/pretrain/questions")
    clips = make_clips(config, "pretrain", [part_of(story, rng) for story in stories])
    rows: list[tuple[str | None, ...]]
    rows = [("Describe the video.", "video", "description", clip.path, describe(clip.story)) for clip in clips]
    for i in range(len(clips) * config.lookups_per_video):
        story = sample_story(rng, num_scenes=rng.randint(config.min_scenes, config.max_scenes))
        question = ASK[CATEGORIES[i % len(CATEGORIES)]](story, rng)
        options = rng.sample([question.correct, *question.distractors], len(LETTERS))
        problem = "\n".join(["Find the options.", *map("{}. {}".format, LETTERS, options)])
        found = rng.sample(list(zip(options, LETTERS, strict=True)), len(LETTERS))
        rows.append((problem, "text", "lookup", None, " ".join(f"{option} {letter}." for option, letter in found)))
    for _ in range(len(clips) * config.readings_per_video):
        story = sample_story(rng, num_scenes=rng.randint(config.min_scenes, config.max_scenes))
        rows.append((f"Read the story. {describe(story)}", "text", "reading", None, statements(story, rng)))
    names = ("problem", "data_type", "problem_type", "videos", "answer")
    common = {"reasoning": None, "task": "open_ended"}
    return [{"problem_id": i, **dict(zip(names, row, strict=True)), **common} for i, row in enumerate(rows)], clips


def statements(story: Story, rng: Random) -> str:
    """Some true sentences about a story, in random order: its ends, its goal, two neighbours and two places."""
    kinds = rng.sample([ask_plot, ask_goal, ask_temporal, ask_temporal, ask_spatial, ask_spatial], 6)
    return " ".join(ask(story, rng).deduction for ask in kinds)


def part_of(story: Story, rng: Random) -> Story:
    """One to all neighbouring scenes of a story: a base model learns from short videos before it can read long ones."""
    count = rng.randint(1, len(story.scenes))
    start = rng.randint(0, len(story.scenes) - count)
    return replace(story, scenes=story.scenes[start : start + count])


def make_clips(config: SyntheticConfig, split: str, stories: list[Story]) -> list[Clip]:
    """Name a file and a seed for each story."""
    return [Clip(f"videos/{split}_{i:06d}.mp4", story, f"{config.seed}/{split}/{i}") for i, story in enumerate(stories)]


def _letters_by_category(categories: list[str], rng: Random) -> dict[str, Iterator[str]]:
    return {category: deal_letters(categories.count(category), rng) for category in CATEGORIES}


def make_records(config: SyntheticConfig) -> tuple[dict[str, list[Record]], list[Clip]]:
    """All records by split and all clips, without drawing a single frame. Stories are disjoint between the splits."""
    taken: set[tuple[Scene, ...]] = set()
    records: dict[str, list[Record]] = {}
    clips: list[Clip] = []
    for split, count in (("eval", config.num_eval_videos), ("train", config.num_train_videos)):
        records[split], new = make_split(config, split, sample_stories(config, split, count, taken))
        clips += new
    if config.num_pretrain_videos:
        stories = sample_stories(config, "pretrain", config.num_pretrain_videos, taken)
        records["pretrain"], new = make_pretrain(config, stories)
        clips += new
    return records, clips


# ----------------------------------------------------------------------------------------------------------- pixels


def shape_mask(shape: str, radius: int) -> NDArray[np.bool_]:
    """[2r+1, 2r+1] True where the shape is; all four have about the same extent."""
    axis = np.linspace(-1.0, 1.0, 2 * radius + 1)
    y, x = axis[:, None], axis[None, :]
    if shape == "circle":
        return x**2 + y**2 <= 1.0
    if shape == "square":
        return (abs(x) <= 0.92) & (abs(y) <= 0.92)
    if shape == "triangle":
        return abs(x) <= (y + 1.0) / 2
    assert shape == "cross", shape
    return (abs(x) <= 0.3) | (abs(y) <= 0.3)


def draw_background(rng: Random, size: int) -> Image:
    """[size, size, 3] dark grey with a faint slope; level, tint and slope vary from video to video."""
    level = rng.uniform(38, 68) + np.array([rng.uniform(-5, 5) for _ in range(3)])
    axis = np.linspace(-1.0, 1.0, size)
    slope = rng.uniform(-7, 7) * axis[:, None] + rng.uniform(-7, 7) * axis[None, :]
    return (level + slope[..., None]).round().astype(np.uint8)


def draw_scene(scene: Scene, background: Image, rng: Random) -> Iterator[Image]:
    """The `MOTION_FRAMES` different frames of a scene: its object on a small circle around a jittered place."""
    size = len(background)
    unit = size / 112
    radius = round(rng.uniform(21.0, 24.0) * unit)
    mask, robot = shape_mask(scene.shape, radius), _robot_distance(radius)
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


def _robot_distance(radius: int) -> NDArray[np.float64]:
    axis = np.linspace(-1.0, 1.0, 2 * radius + 1)
    return np.hypot(axis[:, None], axis[None, :])


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
        pts = 0
        for scene in clip.story.scenes:
            images = draw_scene(scene, background, rng)
            drawn = [av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuv420p") for image in images]
            for step in range(frames_per_scene):
                frame = drawn[step % MOTION_FRAMES]
                frame.pts = pts
                pts += 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


# ---------------------------------------------------------------------------------------------------------- writing


def generate(folder: str | Path, config: SyntheticConfig, *, workers: int = 1) -> None:
    """Write a whole dataset, or leave a complete one of the same config alone.

    All is made in a temporary folder beside `folder` and renamed at the end, so `folder` is never half written.

    Args:
        folder: where `train.jsonl`, `eval.jsonl`, `pretrain.jsonl`, `manifest.json` and `videos/` go.
        config: what to generate.
        workers: processes that draw and encode; the result does not depend on it.

    Raises:
        ValueError: `folder` holds something that this generator did not write.
    """
    folder = Path(folder)
    records, clips = make_records(config)
    if is_complete(folder, config, clips):
        logger.info("%s is complete already", folder)
        return
    _refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        os.chmod(work, 0o755)
        _draw_all(work, clips, config, workers)
        for split, rows in records.items():
            (work / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        manifest = {"fingerprint": config.fingerprint, "config": asdict(config)}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _swap(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_complete(folder: Path, config: SyntheticConfig, clips: list[Clip]) -> bool:
    """Whether `folder` holds what `config` asks for."""
    if _fingerprint(folder) != config.fingerprint:
        return False
    return all((folder / clip.path).is_file() for clip in clips)


def _fingerprint(folder: Path) -> str | None:
    """What `folder`'s manifest says; None if there is no manifest of this generator."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return manifest.get("fingerprint") if isinstance(manifest, dict) else None


def _refuse_foreign(folder: Path) -> None:
    """A folder of this generator is replaced, an empty one filled; anything else is the user's."""
    if folder.exists() and not _fingerprint(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and was not written by this generator (no manifest.json with a fingerprint); choose "
            "another folder, or remove it"
        )


def _draw_all(work: Path, clips: list[Clip], config: SyntheticConfig, workers: int) -> None:
    (work / "videos").mkdir()
    paths = [work / clip.path for clip in clips]
    if workers <= 1:
        for path, clip in zip(paths, clips, strict=True):
            write_video(path, clip, config)
        return
    # spawn: the caller may hold threads (torch, loggers) that a fork would break
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for _ in pool.map(write_video, paths, clips, [config] * len(clips), chunksize=8):
            pass


def _swap(work: Path, folder: Path) -> None:
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.rename(folder, old / "was")
        os.rename(work, folder)
        shutil.rmtree(old)
    else:
        os.rename(work, folder)


def main(args: list[str] | None = None) -> None:
    """Command line: `--out`, `--workers` and one flag per field of `SyntheticConfig`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(description="Generate synthetic long videos with questions.")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and encode")
    parser.add_class_arguments(SyntheticConfig)
    options = parser.parse_args(args).as_dict()
    out, workers = options.pop("out"), options.pop("workers")
    generate(out, SyntheticConfig(**options), workers=workers)


if __name__ == "__main__":
    main()
