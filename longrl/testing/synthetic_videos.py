"""Long videos with known stories: real H.264 files and records in the LongVideo-Reason schema, all from one seed.

    python -m longrl synthetic --out data/synthetic --num_train_videos 400 --num_eval_videos 60

writes `train.jsonl`, `eval.jsonl`, `pretrain.jsonl` (if asked for), `manifest.json` and `videos/`. What the videos
show and the questions are in stories.py; answer letters are dealt out evenly per split and category.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from longrl.io.atomic import atomic_folder
from longrl.io.jsonl import write_jsonl
from longrl.rewards.options import with_options
from longrl.testing.drawing import Clip, write_video
from longrl.testing.stories import (
    ASK,
    CATEGORIES,
    COLORS,
    LETTERS,
    SHAPES,
    Scene,
    Story,
    describe_story,
    part_of,
    sample_story,
    true_statements,
)

logger = logging.getLogger(__name__)

VERSION = 3
"""Raise it when the same config gives other records or pixels, so that old folders are made again."""

Record = dict[str, Any]


@dataclass(frozen=True)
class SyntheticConfig:
    """Options of the generator. Equal configs give equal records and equal decoded pixels."""

    num_train_videos: int = 400
    """Videos whose questions go to train.jsonl."""
    num_eval_videos: int = 60
    """Videos whose questions go to eval.jsonl; they share no story with the training videos."""
    num_pretrain_videos: int = 0
    """Videos with a description instead of questions, for the demo's base model; they share no story with the rest."""
    min_scenes: int = 4
    """Fewest scenes of a video."""
    max_scenes: int = 5
    """Most scenes of a video; more make longer videos and harder questions."""
    scene_s: float = 8.0
    """Seconds each scene lasts."""
    fps: int = 4
    """Frames per second of the files."""
    size: int = 112
    """Height and width in pixels."""
    questions_per_video: int = 4
    """1 to 4, each of another category; fewer than 4 rotate through the categories from video to video."""
    pretrain_scenes: int = 0
    """At most so many scenes in a pretraining video; 0: up to all of its story."""
    lookups_per_video: int = 2
    """Rows per pretraining video that list options."""
    readings_per_video: int = 1
    """Rows per pretraining video that tell of a story in text."""
    seed: int = 0
    """Decides all stories, pictures and questions."""

    def __post_init__(self) -> None:
        counts = {name: value for name, value in asdict(self).items() if re.match("num_|pretrain_|.*s_per_", name)}
        if min(counts.values()) < 0:
            raise ValueError(f"the numbers of videos, scenes and rows must be at least 0, got {counts}")
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


def sample_stories(config: SyntheticConfig, split: str, count: int, taken: set[tuple[Scene, ...]]) -> list[Story]:
    """Draw `count` stories of a split that occur nowhere in `taken`, and add them to it."""
    rng = Random(f"{config.seed}/{split}/stories")
    stories: list[Story] = []
    while len(stories) < count:
        story = _draw_story(rng, config)
        if story.scenes not in taken:
            taken.add(story.scenes)
            stories.append(story)
    return stories


def make_split(config: SyntheticConfig, split: str, stories: list[Story]) -> tuple[list[Record], list[Clip]]:
    """Questions about `stories`, `questions_per_video` for each, and the clips they need. Nothing is drawn."""
    rng = Random(f"{config.seed}/{split}/questions")
    clips = make_clips(config, split, stories)
    num = config.questions_per_video
    pairs = [(clip, CATEGORIES[(i * num + j) % len(CATEGORIES)]) for i, clip in enumerate(clips) for j in range(num)]
    letters: dict[str, list[str]] = {}
    for name in CATEGORIES:  # in each category every letter is right as often as any other, up to one
        count = sum(category == name for _, category in pairs)
        letters[name] = [LETTERS[i % len(LETTERS)] for i in range(count)]
        rng.shuffle(letters[name])
    records = []
    for index, (clip, category) in enumerate(pairs):
        question, letter = ASK[category](clip.story, rng), letters[category].pop(0)
        options = list(question.distractors)
        options.insert(LETTERS.index(letter), question.correct)
        records.append(
            {
                "problem_id": index,
                "problem": with_options(question.text, options),
                "data_type": "video",
                "problem_type": category,
                "reasoning": f"{describe_story(clip.story)} {question.deduction}",
                "videos": clip.path,
                "answer": f"<answer>{letter}</answer>",
            }
        )
    return records, clips


def make_pretrain(config: SyntheticConfig, stories: list[Story]) -> tuple[list[Record], list[Clip]]:
    """Rows that teach a base model to describe videos and to read options, and neither the questions nor reasoning.

    `description` rows have a video of one or more scenes of a story and their listing as answer; `lookup` rows have no
    video and four options, as the categories offer them, to be listed with their letters in random order.
    """
    rng = Random(f"{config.seed}/pretrain/questions")
    clips = make_clips(config, "pretrain", [part_of(story, rng, config.pretrain_scenes) for story in stories])
    rows: list[tuple[str, str, str, str | None, str]] = [
        ("Describe the video.", "video", "description", clip.path, describe_story(clip.story)) for clip in clips
    ]
    for i in range(len(clips) * config.lookups_per_video):
        question = ASK[CATEGORIES[i % len(CATEGORIES)]](_draw_story(rng, config), rng)
        options = rng.sample([question.correct, *question.distractors], len(LETTERS))
        pairs = rng.sample(list(zip(options, LETTERS, strict=True)), len(LETTERS))
        answer = " ".join(f"{option} {letter}." for option, letter in pairs)
        rows.append((with_options("Find the options.", options), "text", "lookup", None, answer))
    for _ in range(len(clips) * config.readings_per_video):
        story = _draw_story(rng, config)
        rows.append((f"Read the story. {describe_story(story)}", "text", "reading", None, true_statements(story, rng)))
    names = ("problem", "data_type", "problem_type", "videos", "answer")
    common = {"reasoning": None, "task": "open_ended"}
    return [{"problem_id": i, **dict(zip(names, row, strict=True)), **common} for i, row in enumerate(rows)], clips


def _draw_story(rng: Random, config: SyntheticConfig) -> Story:
    return sample_story(rng, num_scenes=rng.randint(config.min_scenes, config.max_scenes))


def make_clips(config: SyntheticConfig, split: str, stories: list[Story]) -> list[Clip]:
    """Name a file and a seed for each story."""
    return [Clip(f"videos/{split}_{i:06d}.mp4", story, f"{config.seed}/{split}/{i}") for i, story in enumerate(stories)]


def make_records(config: SyntheticConfig) -> tuple[dict[str, list[Record]], list[Clip]]:
    """Records by split and all clips, without drawing a single frame. Stories are disjoint between the splits."""
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


def generate_videos(folder: str | Path, config: SyntheticConfig, *, workers: int = 1) -> None:
    """Writes a whole dataset, or leaves a complete one of the same config alone.

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
    fingerprint = _read_fingerprint(folder)
    if fingerprint == config.fingerprint and all((folder / clip.path).is_file() for clip in clips):
        logger.info("%s is complete already", folder)
        return
    # A folder of this generator is replaced, an empty one filled; anything else is the user's.
    if folder.exists() and not fingerprint and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} exists and was not written by this generator (no manifest.json with a fingerprint); choose "
            "another folder, or remove it"
        )
    with atomic_folder(folder) as work:
        _draw_all(work, clips, config, workers)
        for split, rows in records.items():
            write_jsonl(work / f"{split}.jsonl", rows)
        manifest = {"fingerprint": config.fingerprint, "config": asdict(config)}
        (work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _read_fingerprint(folder: Path) -> str | None:
    """Fingerprint in `folder`'s manifest; None if there is no manifest of this generator."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return None
    return manifest.get("fingerprint") if isinstance(manifest, dict) else None


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
