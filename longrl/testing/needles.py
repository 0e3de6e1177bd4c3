"""Videos whose answer is on show for two seconds, between the frames that a coarse look takes.

    python -m longrl.testing.needles runs/tools/data

writes `train.jsonl` (questions), `traces.jsonl` (worked answers with calls of `crop_video`), `eval.jsonl`, `videos/`.

A video has scenes of 8 seconds, each with an object of another colour; on one of them sits a robot. In the middle of
each scene a white object takes its place, the needle. The question is for the needle of the robot's scene; the options
are the needles of that scene and of three others, so that who looks at another scene is led to a wrong option, and who
looks nowhere has 1 in 4. At `data.video.fps` 0.5 frames are seconds 1, 3, 5 and 7 of a scene: they show the robot, and
no needle.

Worked answers are those of a beginner: some look at the right scene, some at another, some do not look and guess.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from longrl.datamodules.rows.question_rows import longvideo_reason_row
from longrl.environments.traces import record_trace
from longrl.environments.video_tools import VideoTools
from longrl.io.atomic import atomic_folder
from longrl.io.jsonl import write_jsonl
from longrl.rewards.options import with_options
from longrl.testing.drawing import MOTION_FRAMES, Image, draw_background, draw_scene
from longrl.testing.stories import COLORS, LETTERS, POSITIONS, SHAPES, Scene
from longrl.testing.tool_traces import crop_call

FPS = 4
SCENE_S = 8
NEEDLE_S = (3.25, 5.0)
"""When in a scene its needle is on show, in seconds."""
NEEDLE_COLOR = "white"
TOOLS: dict[str, Any] = {"fps": 2.0, "max_frames": 16}
"""Options of `VideoTools`, those of configs/demo/tools."""
Record = dict[str, Any]


@dataclass(frozen=True)
class NeedleConfig:
    """Options of the generator; equal ones give equal records and pixels."""

    num_train_videos: int = 600
    num_eval_videos: int = 200
    num_scenes: int = 4
    size: int = 56
    """Height and width in pixels."""
    traces_per_video: int = 1
    right_looks: float = 0.4
    """Share of worked answers that look at the scene that was asked about."""
    wrong_looks: float = 0.3
    """Share of those that look at another; the rest does not look."""
    seed: int = 0


@dataclass(frozen=True)
class NeedleStory:
    """The scenes of a video and the needle of each."""

    scenes: tuple[Scene, ...]
    needles: tuple[Scene, ...]
    robot: int
    """The scene in which it is."""


def sample_needle_story(rng: Random, num_scenes: int) -> NeedleStory:
    """Draws scenes of different colours, and needles that differ in shape or position."""
    colors = rng.sample([color for color in COLORS if color != NEEDLE_COLOR], num_scenes)
    places = rng.sample([(shape, position) for shape in SHAPES for position in POSITIONS], num_scenes)
    robot = rng.randrange(num_scenes)
    scenes = []
    for index, color in enumerate(colors):
        scenes.append(Scene(color, rng.choice([*SHAPES]), rng.choice(POSITIONS), index == robot))
    needles = [Scene(NEEDLE_COLOR, shape, position, False) for shape, position in places]
    return NeedleStory(tuple(scenes), tuple(needles), robot)


def needle_name(needle: Scene) -> str:
    """For example `cross top left`."""
    return f"{needle.shape} {needle.position}"


def question_record(story: NeedleStory, video: str, rng: Random, number: int) -> tuple[Record, list[str]]:
    """A record in the LongVideo-Reason schema, and its options."""
    others = [needle for needle in story.needles if needle is not story.needles[story.robot]]
    right = needle_name(story.needles[story.robot])
    options = [needle_name(needle) for needle in rng.sample(others, 3)]
    options.insert(rng.randrange(4), right)
    record = {
        "problem_id": number,
        "problem": with_options("What comes for a moment while the robot is there?", options),
        "data_type": "video",
        "problem_type": "needle",
        "reasoning": None,
        "videos": video,
        "answer": f"<answer>{LETTERS[options.index(right)]}</answer>",
        "metadata": {"evidence_s": [story.robot * SCENE_S + second for second in NEEDLE_S]},
    }
    return record, options


def listing(story: NeedleStory) -> str:
    """What a coarse look shows: colours and when they begin, up to the robot."""
    scenes = enumerate(story.scenes[: story.robot + 1])
    return " ".join(f"{scene.color} {index * SCENE_S}{', robot' if scene.visited else ''}." for index, scene in scenes)


def turns_of(story: NeedleStory, options: list[str], look: int | None) -> list[str]:
    """What a beginner says to a question.

    Args:
        story: of its video.
        options: it has.
        look: the scene that is looked at; None: the first option is guessed.
    """
    thought = f"<think>{listing(story)}</think>"
    if look is None:
        return [f"{thought}<answer>{options[0]}</answer>"]
    needle = needle_name(story.needles[look])
    call = crop_call(look * SCENE_S, (look + 1) * SCENE_S)
    return [f"{thought}\n{call}", f"<think>{needle}.</think><answer>{needle}</answer>"]


def make_needles(config: NeedleConfig) -> tuple[dict[str, list[Record]], dict[str, NeedleStory]]:
    """Records of `train`, `traces` and `eval`, and the story of each video; nothing is drawn.

    Those of `traces` have the `turns` of a worked answer, without what tools answer.
    """
    records: dict[str, list[Record]] = {"train": [], "traces": [], "eval": []}
    stories: dict[str, NeedleStory] = {}
    for split, count in (("train", config.num_train_videos), ("eval", config.num_eval_videos)):
        rng = Random(f"{config.seed}/needles/{split}")
        for number in range(count):
            story = sample_needle_story(rng, config.num_scenes)
            video = f"videos/{split}_{number:06d}.mp4"
            stories[video] = story
            record, _ = question_record(story, video, rng, len(records[split]))
            records[split].append(record)
            for _ in range(config.traces_per_video if split == "train" else 0):
                record, options = question_record(story, video, rng, len(records["traces"]))
                look = draw_look(rng, config, story.robot)
                records["traces"].append(record | {"turns": turns_of(story, options, look)})
    return records, stories


def draw_look(rng: Random, config: NeedleConfig, scene: int) -> int | None:
    """The scene that a beginner looks at, None if nowhere."""
    drawn = rng.random()
    if drawn < config.right_looks:
        return scene
    if drawn < config.right_looks + config.wrong_looks:
        return rng.choice([index for index in range(config.num_scenes) if index != scene])
    return None


def draw_frames(story: NeedleStory, rng: Random, size: int) -> Iterator[Image]:
    """All frames of a video, [size, size, 3] each."""
    background = draw_background(rng, size)
    for scene, needle in zip(story.scenes, story.needles, strict=True):
        images = list(draw_scene(scene, background, rng))
        flashes = list(draw_scene(needle, background, rng))
        for step in range(SCENE_S * FPS):
            is_needle = NEEDLE_S[0] <= step / FPS < NEEDLE_S[1]
            yield (flashes if is_needle else images)[step % MOTION_FRAMES]


def write_needles(folder: str | Path, config: NeedleConfig) -> Path:
    """Writes the whole data set, or nothing."""
    import av

    folder = Path(folder)
    records, stories = make_needles(config)
    with atomic_folder(folder) as work:
        (work / "videos").mkdir()
        for name, story in stories.items():
            with av.open(str(work / name), "w") as container:
                stream = container.add_stream("libx264", rate=FPS)
                stream.width = stream.height = config.size
                stream.pix_fmt = "yuv420p"
                stream.options = {"preset": "ultrafast", "crf": "20", "g": "16", "threads": "1"}
                for pts, image in enumerate(draw_frames(story, Random(f"{config.seed}/{name}"), config.size)):
                    frame = av.VideoFrame.from_ndarray(image, "rgb24")
                    frame.pts = pts
                    container.mux(stream.encode(frame))
                container.mux(stream.encode(None))
        for record in records["traces"]:
            row = longvideo_reason_row(record, record["problem_id"], str(work))
            record["trace"] = record_trace(VideoTools(**TOOLS), row, record.pop("turns"), str(work))
        for split, rows in records.items():
            write_jsonl(work / f"{split}.jsonl", rows)
    return folder


TOOL_WORDS = (
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    '{"name": "crop_video", "arguments": {"start_s": ', ', "end_s": ', "}}",
)  # fmt: skip
"""Tokens that the demo's base lacks. Qwen's tokenizers have some of them, and need few for the rest."""


def write_needle_base(demo_base: str | Path, folder: str | Path) -> Path:
    """Writes the demo's base model with tokens for calls of tools, whose embeddings are random."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_base)
    processor.tokenizer.add_tokens(list(TOOL_WORDS))
    model: Any = AutoModelForImageTextToText.from_pretrained(demo_base, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight
    num_known = len(embeddings)
    size = -(-len(processor.tokenizer) // 16) * 16
    model.resize_token_embeddings(size, mean_resizing=False)
    generator = torch.Generator().manual_seed(0)
    embeddings = model.get_input_embeddings().weight.data
    drawn = torch.randn(size - num_known, embeddings.shape[1], generator=generator)
    embeddings[num_known:] = drawn * embeddings[:num_known].std()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


if __name__ == "__main__":
    write_needles(sys.argv[1], NeedleConfig())
