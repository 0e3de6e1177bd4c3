"""Parts of a video that tools show: which frames, by which key, and what is refused."""

import json
import pickle
from dataclasses import replace

import pytest
import torch

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.environments.video_tools import VideoTools
from longrl.types import Row
from tests.datamodules.media.test_video import shown, write

SUBTITLES = [
    {"start": 0, "end": 1, "text": "Hello there"},
    {"start": 1, "end": 2, "text": "a red ball"},
    {"start": 3, "end": 4, "text": "the red balloon"},
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """4 s at 10 frames per second, frame i of level 10 + 3 i."""
    return str(write(tmp_path_factory.mktemp("clips") / "v.mp4", 40))


def tools(clip, metadata=None, videos=1, **options):
    environment = VideoTools(**options)
    environment.reset(Row("r", "", "", videos=(clip,) * videos, metadata=metadata or {}))
    return environment


def ask(environment, name, **arguments):
    text = "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"
    (response,) = environment.step(text).responses
    return response


def decoded(frames):
    parts = list(frames.source())
    return replace(frames, pixels=torch.cat([part.pixels for part in parts]))


def test_a_span_shows_its_frames_at_its_rate(clip):
    response = ask(tools(clip), "crop_video", start_s=1, end_s=2, fps=5)
    text, frames = response.content
    assert text == "The video from 1 to 2 s, 5 frames.\n"
    assert frames.pixels.shape == (0, 3, 48, 64)
    assert shown(decoded(frames)) == [11, 13, 15, 17, 19]
    assert response.call.span_s == (1.0, 2.0)
    assert response.call.frame_times == frames.timestamps == pytest.approx((1.1, 1.3, 1.5, 1.7, 1.9))
    assert response.call.error is None
    assert response.call.seconds > 0


def test_equal_frames_have_the_key_of_a_prompt_that_shows_them(clip):
    environment = tools(clip)
    _, first = ask(environment, "crop_video", start_s=1, end_s=2, fps=5).content
    _, again = ask(pickle.loads(pickle.dumps(environment)), "crop_video", start_s=1.0, end_s=2.0, fps=5).content
    of_prompt = read_video(clip, VideoSampling(span_s=(1.0, 2.0), fps=5.0))
    assert first.key == again.key == of_prompt.key
    assert torch.equal(decoded(first).pixels, of_prompt.pixels)
    _, other = ask(environment, "crop_video", start_s=1, end_s=2.5, fps=5).content
    assert other.key != first.key
    _, smaller = ask(tools(clip, max_pixels=768), "crop_video", start_s=1, end_s=2, fps=5).content
    assert smaller.key != first.key
    assert decoded(smaller).pixels.shape == (5, 3, 24, 32)


def test_a_span_is_cut_at_the_end_of_the_video_and_thinned_to_the_limit(clip):
    text, frames = ask(tools(clip, max_frames=6), "crop_video", start_s=1, end_s=100, fps=10).content
    assert text == "The video from 1 to 4 s, 6 frames. The video ends at 4 s.\n"
    assert len(frames.timestamps) == 6


def test_zoom_shows_a_part_of_a_frame_enlarged(clip):
    response = ask(tools(clip), "zoom", time_s=2.0, box=[250, 0, 750, 500])
    _, image = response.content
    assert image.kind == "image"
    assert image.pixels.shape == (0, 3, 96, 128)  # 24 x 32 pixels, four times as large
    pixels = decoded(image).pixels
    assert pixels.shape == (1, 3, 96, 128)
    assert shown(decoded(image)) == [20]
    assert response.call.frame_times == (2.0,)
    _, other = ask(tools(clip), "zoom", time_s=2.0, box=[250, 0, 750, 501]).content
    assert other.key != image.key


def test_single_frames_are_images(clip):
    response = ask(tools(clip), "get_frames", times_s=[3.0, 0.5, 0.5, 4.0])
    images = response.content[1::2]
    assert [shown(decoded(image)) for image in images] == [[30], [5], [39]]
    assert response.content[::2] == ("The frame at 3 s:\n", "\nThe frame at 0.5 s:\n", "\nThe frame at 4 s:\n")
    assert response.call.frame_times == (3.0, 0.5, 3.999)
    assert response.call.span_s == (0.5, 3.999)


def test_subtitles_are_found_by_most_words(clip):
    environment = tools(clip, {"subtitles": SUBTITLES})
    assert ask(environment, "search_subtitles", query="Red").content == (
        "[1 to 2 s] a red ball\n[3 to 4 s] the red balloon",
    )
    assert ask(environment, "search_subtitles", query="red balloon").content == ("[3 to 4 s] the red balloon",)
    assert ask(environment, "search_subtitles", query="green").content == ("None of 3 lines has any of these words.",)
    assert ask(tools(clip), "search_subtitles", query="red").content == ("This video has no subtitles.",)


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        (
            "crop_video",
            {"start_s": 5, "end_s": 9},
            "start_s must be from 0 to below 4 s, got 5; The video ends at 4 s.",
        ),
        ("crop_video", {"start_s": -1, "end_s": 2}, "start_s must be from 0"),
        ("crop_video", {"start_s": 2, "end_s": 2}, "start_s must be before end_s, got 2 and 2"),
        ("crop_video", {"start_s": 3, "end_s": 2}, "swap"),
        ("crop_video", {"start_s": 1, "end_s": 2, "fps": 0}, "fps must be above 0"),
        ("crop_video", {"start_s": "1", "end_s": 2}, "must be a number, got `1`"),
        ("crop_video", {"start_s": True, "end_s": 2}, "must be a number"),
        ("crop_video", {"start_s": 10**400, "end_s": 2}, "must be below 1e15"),
        ("crop_video", {"start_s": 1, "end_s": 2, "video": 1}, "takes no `video`"),
        ("zoom", {"time_s": 9, "box": [0, 0, 500, 500]}, "a time must be from 0 to 4 s, got 9"),
        ("zoom", {"time_s": 1, "box": [100, 100, 100, 500]}, "left < right"),
        ("zoom", {"time_s": 1, "box": [0, 0, 1001, 500]}, "each from 0 to 1000"),
        ("zoom", {"time_s": 1, "box": [0, 0, 500]}, "box must be [left, top, right, bottom]"),
        ("zoom", {"time_s": 1, "box": 3}, "must be a list"),
        ("get_frames", {"times_s": []}, "times_s must be 1 to 8 times, got 0"),
        ("get_frames", {"times_s": list(range(999))}, "times_s must be 1 to 8 times, got 999"),
        ("get_frames", {"times_s": list(range(2000))}, "may have 1000 items, got 2000"),
        ("get_frames", {"times_s": ["x"]}, "an item of `times_s`"),
        ("search_subtitles", {"query": "  "}, "query must have 1 to 300 characters"),
    ],
)
def test_what_is_outside_the_video_is_refused_with_its_length(clip, name, arguments, said):
    response = ask(tools(clip), name, **arguments)
    assert response.content == (f"Error: {response.call.error}",)
    assert said in response.call.error


def test_of_a_row_that_asks_about_a_part_that_part_alone_is_shown(clip):
    environment = tools(clip, {"span_s": [1, 3], "subtitles": SUBTITLES})
    assert "from 1 to below 3 s" in ask(environment, "crop_video", start_s=0.5, end_s=2).call.error
    assert ask(environment, "crop_video", start_s=2, end_s=4).call.span_s == (2.0, 3.0)
    assert "None of 1 line" in ask(environment, "search_subtitles", query="hello").content[0]


def test_several_videos_are_told_apart_by_number(clip):
    environment = tools(clip, videos=2, several_videos=True)
    assert "video" in environment.tools[0]["function"]["parameters"]["properties"]
    assert ask(environment, "crop_video", start_s=1, end_s=2, video=2).call.error is None
    assert "from 1 to 2, got 3" in ask(environment, "crop_video", start_s=1, end_s=2, video=3).call.error
    with pytest.raises(ValueError, match="set several_videos"):
        tools(clip, videos=2)
    assert "no video in this question" in ask(tools(clip, videos=0), "crop_video", start_s=1, end_s=2).call.error


def test_files_outside_the_root_are_not_read(clip, tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps(SUBTITLES))
    metadata = {"subtitles": str(tmp_path / "secret.json")}
    assert "outside data.media_root" in ask(tools(clip, metadata), "search_subtitles", query="red").call.error
    inside = tools(clip, metadata, allow_outside_paths=True)
    assert "red ball" in ask(inside, "search_subtitles", query="red").content[0]
    elsewhere = tools(clip, media_root=str(tmp_path))
    assert "outside data.media_root" in ask(elsewhere, "crop_video", start_s=1, end_s=2).call.error
    missing = tools(str(tmp_path / "gone.mp4"))
    assert "the file does not exist" in ask(missing, "crop_video", start_s=1, end_s=2).call.error
    remote = tools("https://example.invalid/v.mp4")
    assert "it lies elsewhere" in ask(remote, "crop_video", start_s=1, end_s=2).call.error


def test_only_some_of_the_tools_may_be_offered(clip):
    environment = tools(clip, only=["crop_video"])
    assert [schema["function"]["name"] for schema in environment.tools] == ["crop_video"]
    error = ask(environment, "zoom", time_s=1, box=[0, 0, 1, 1]).call.error
    assert error == "there is no tool `zoom`; use one of crop_video"
    with pytest.raises(ValueError, match="only must name some of"):
        VideoTools(only=["crop"])
