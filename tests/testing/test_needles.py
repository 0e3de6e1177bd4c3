"""Needles are on show where their questions say, and on no frame that a coarse look takes."""

from collections import Counter

import numpy as np
import pytest

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import open_video
from longrl.environments.tool_calls import parse_tool_calls
from longrl.environments.video_tools import VideoTools
from longrl.io.jsonl import read_jsonl
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.needles import (
    NEEDLE_S,
    SCENE_S,
    TOOL_WORDS,
    TOOLS,
    NeedleConfig,
    make_needles,
    needle_name,
    write_needle_base,
    write_needles,
)
from longrl.testing.stories import LETTERS
from tests.runs import ROOT

CONFIG = NeedleConfig(num_train_videos=3, num_eval_videos=2, size=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_needles(tmp_path_factory.mktemp("needles") / "data", CONFIG)


def is_white(frame):
    """[3, H, W] uint8 with a white object of some size, and none of another colour."""
    pixels = frame.float()
    return bool((pixels.amin(0) > 200).float().mean() > 0.05)


def test_coarse_frames_show_no_needle_and_a_crop_shows_each(folder):
    records, stories = make_needles(CONFIG)
    for name in stories:
        (coarse,) = open_video(str(folder / name), VideoSampling(fps=0.5)).chunks(64)
        assert [is_white(frame) for frame in coarse.pixels] == [False] * (CONFIG.num_scenes * SCENE_S // 2)
        for scene in range(CONFIG.num_scenes):
            span = (float(scene * SCENE_S), float((scene + 1) * SCENE_S))
            (crop,) = open_video(str(folder / name), VideoSampling(fps=TOOLS["fps"], span_s=span)).chunks(64)
            shown = [NEEDLE_S[0] <= time - span[0] < NEEDLE_S[1] for time in crop.timestamps]
            assert [is_white(frame) for frame in crop.pixels] == shown
            assert sum(shown) >= 3
    assert {record["videos"] for record in records["train"]} == {name for name in stories if "train" in name}


def test_the_question_alone_says_nothing():
    records, stories = make_needles(NeedleConfig(num_train_videos=400, num_eval_videos=0))
    letters = Counter()
    robots = Counter()
    for record in records["train"]:
        story = stories[record["videos"]]
        _, *lines = record["problem"].split("\n")
        letter = record["answer"].removeprefix("<answer>")[0]
        options = [line.partition(". ")[2] for line in lines]
        assert [scene.visited for scene in story.scenes].index(True) == story.robot
        assert record["metadata"]["evidence_s"][0] // SCENE_S == story.robot
        assert options[LETTERS.index(letter)] == needle_name(story.needles[story.robot])
        assert sorted(options) == sorted(map(needle_name, story.needles))  # other scenes lead to wrong options
        letters[letter] += 1
        robots[story.robot] += 1
    assert len({scene.color for story in stories.values() for scene in story.scenes}) == 5
    for counts in (letters, robots):
        assert min(counts.values()) > 70  # of 400, 100 each expected


def test_worked_answers_are_those_of_a_beginner(folder):
    config = NeedleConfig(num_train_videos=600, num_eval_videos=0)
    records, _ = make_needles(config)
    looks = Counter()
    for record in records["traces"]:
        call = next(iter(parse_tool_calls(record["turns"][0])), None)
        start = None if call is None else call.arguments["start_s"]
        right = int(record["metadata"]["evidence_s"][0] // SCENE_S) * SCENE_S
        looks["none" if start is None else "right" if start == right else "wrong"] += 1
    total = sum(looks.values())
    assert looks["right"] / total == pytest.approx(config.right_looks, abs=0.06)
    assert looks["wrong"] / total == pytest.approx(config.wrong_looks, abs=0.06)
    # What is written has what the tools answer to these calls.
    written = list(read_jsonl(folder / "traces.jsonl"))
    assert {len(record["trace"]) for record in written} == {1, 3}
    for record in written:
        for message in record["trace"][1:2]:
            _, video = message["content"]
            assert video["span_s"][1] - video["span_s"][0] == SCENE_S


def test_equal_configs_give_equal_files_and_others_do_not(folder, tmp_path):
    again = write_needles(tmp_path / "again", CONFIG)
    for file in ("train.jsonl", "eval.jsonl", "traces.jsonl", "videos/eval_000001.mp4"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    first, _ = make_needles(CONFIG)
    second, _ = make_needles(NeedleConfig(num_train_videos=3, num_eval_videos=2, size=64, seed=1))
    assert first["train"] != second["train"]


def test_the_base_reads_calls_in_few_tokens(tmp_path):
    family = Qwen2_5_VLFamily(str(write_needle_base(ROOT / "configs" / "demo" / "base", tmp_path / "base")))
    plain = Qwen2_5_VLFamily(str(ROOT / "configs" / "demo" / "base"))
    call = '<tool_call>\n{"name": "crop_video", "arguments": {"start_s": 16, "end_s": 24}}\n</tool_call>'
    assert len(family.tokenizer(call)["input_ids"]) < 12 < len(plain.tokenizer(call)["input_ids"])
    assert family.tokenizer.decode(family.tokenizer(call)["input_ids"]) == call
    ours, theirs = (each.build().get_input_embeddings().weight.detach().numpy() for each in (family, plain))
    assert np.array_equal(ours[: len(theirs)], theirs)
    assert len(ours) >= len(family.tokenizer) > len(plain.tokenizer) + len(TOOL_WORDS) - 1
    assert np.abs(ours[len(theirs) :]).max() > 0


def test_tools_of_the_bench_are_those_of_the_traces():
    from longrl.io.plain_yaml import load_yaml

    settings = load_yaml((ROOT / "configs" / "demo" / "tools" / "common.yaml").read_text())["rollout"]["environment"]
    assert settings["options"] == TOOLS
    VideoTools(**TOOLS)
