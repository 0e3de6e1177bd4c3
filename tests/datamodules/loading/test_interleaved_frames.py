"""Frames of a video as images with its subtitles between them, as LongVideoBench's loader lays them out.

The layouts are those of `insert_subtitles_into_frames` of longvideobench/LongVideoBench fc3c553, which 3,000 random
videos and subtitles also gave.
"""

import json
from dataclasses import replace

import pytest
import torch

from longrl.datamodules.loading.interleaved_frames import interleaved_text
from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits
from longrl.datamodules.media.subtitles import Subtitles
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.types import Frames, Row, UnusableSample
from tests.datamodules.media.test_video import write
from tests.tiny import vl_family

OPTIONS = Subtitles("record", "interleaved", heading="", ending="\n", max_chars=1000)
TEMPLATE = "{subtitles}Question: {problem}"


def images(*times, duration_s=20.0):
    pixels = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    return [Frames("image", pixels, (time,), str(n), duration_s, (n,)) for n, time in enumerate(times)]


def layout(lines, shown_at, from_s=0.0, **changes):
    row = Row("1", "?", "A", videos=("v.mp4",), metadata={"subtitles": lines, "subtitles_from_s": from_s})
    options = replace(OPTIONS, ending="", **changes)
    return interleaved_text(row, options, images(*shown_at)).replace("<image>", "*").split("\n")


def stamped(*lines):
    return [{"timestamp": [start, end], "text": text} for start, end, text in lines]


@pytest.mark.parametrize(
    ("lines", "from_s", "expected"),
    [
        # Behind the frames that are on show by its middle; frames at 0, 5, 10 and 15 s.
        (stamped((3.0, 6.0, "a"), (4.0, 7.0, "b"), (8.0, 13.0, "c")), 0.0, ["*", "a", "*", "b", "*", "c", "*"]),
        # One during which no frame appears is left out; at the very frame it is none either.
        (stamped((1.0, 4.0, "a"), (5.0, 7.0, "b"), (14.0, 16.0, "c")), 0.0, ["*", "*", "*", "*", "c"]),
        # Less than a second counts as a second around its middle.
        (stamped((5.1, 5.2, "a"), (10.6, 10.7, "b")), 0.0, ["*", "*", "a", "*", "*"]),
        # Without an end it lasts as long as the video.
        (stamped((9.0, None, "a")), 0.0, ["*", "*", "*", "a", "*"]),
        # Times of the file begin before the video.
        (stamped((103.0, 107.0, "a")), 100.0, ["*", "*", "a", "*", "*"]),
        ([{"start": "00:00:04.500", "end": "00:00:06.000", "line": "a"}], 0.0, ["*", "*", "a", "*", "*"]),
        ([], 0.0, ["*", "*", "*", "*"]),
    ],
)
def test_lines_stand_where_the_released_loader_puts_them(lines, from_s, expected):
    assert layout(lines, (0.0, 5.0, 10.0, 15.0), from_s) == expected


def test_many_lines_are_thinned_and_may_have_their_times():
    lines = stamped(*((float(n), n + 2.0, f"line {n}") for n in range(0, 16, 2)))
    assert layout(lines, (1.0, 9.0), times=True) == ["*", "[0:00] line 0", "*", "[0:08] line 8"]
    assert layout(lines, (1.0, 9.0), max_chars=10) == ["*", "line 0", "*"]
    assert layout(lines, (1.0, 9.0), heading="Said:")[0] == "Said:"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interleaved")
    write(folder / "abc.mp4", 100, rate=25, size=(64, 48))
    lines = stamped((0.5, 1.5, "Hello <|image_pad|> there."), (2.5, 3.9, "Good night."))
    (folder / "abc.json").write_text(json.dumps(lines))
    return folder


def shown(clip, family, **changes):
    row = Row("1", "Who?\nA. x\nB. y", "A", videos=(str(clip / "abc.mp4"),),
              metadata={"subtitles": str(clip / "abc.json")})  # fmt: skip
    video = VideoSampling(fps=1.0, min_frames=1, max_frames=64, moments="whole_steps")
    options = {"video": video, "subtitles": OPTIONS, "question_template": TEMPLATE, **changes}
    return row, RowRenderer(family, **options)


def test_a_prompt_shows_single_frames_at_their_times(clip):
    row, renderer = shown(clip, ChatReader(64))
    prompt = renderer(row)
    assert prompt.frame_indices == ((0,), (25,), (50,), (75,))
    assert [times[0] for times in prompt.frame_times] == [0.0, 1.0, 2.0, 3.0]
    assert [item.kind for item in prompt.media] == ["image"] * 4
    text = prompt.text.replace("\ufdd0", "")
    assert text == (
        "<image>\n<image>\nHello <|image_pad|> there.\n<image>\n<image>\nGood night.\nQuestion: Who?\nA. x\nB. y"
    )
    assert len({item.key for item in prompt.media}) == 4
    blind = replace(renderer, blind=True)(row)
    assert (blind.text, blind.media) == ("Question: Who?\nA. x\nB. y", ())


def test_a_model_reads_them_as_images_with_text_between(clip):
    """What a line spells of a placeholder is text."""
    family = vl_family()
    family.load_processing()
    row, renderer = shown(clip, family)
    prompt = renderer(row)
    token = family.config.image_token_id
    runs = "".join("*" if token_id == token else "." for token_id in prompt.input_ids.tolist())
    assert len([run for run in runs.split(".") if run]) == 4
    assert runs.count("*") == sum(family.num_features(item) for item in prompt.media)
    alone = family.patch(
        Frames("image", renderer._reader._single_frames(row, row.videos[0], renderer.video)[2].pixels, (0.0,), "k")
    )
    assert torch.equal(prompt.media[2].patches, alone.patches)


def test_what_cannot_be_laid_out_says_why(clip):
    row, renderer = shown(clip, ChatReader(64))
    with pytest.raises(UnusableSample, match="lays out the frames of one video, and row '1' has other media"):
        renderer(replace(row, videos=(*row.videos, *row.videos)))
    with pytest.raises(UnusableSample, match=r"its 4 frames as single images take 0 MiB, above data.max_held_mib=0"):
        replace(renderer, decoding=DecodeLimits(max_held_mib=0))(row)
    with pytest.raises(ValueError, match=r"data.subtitles.lines=interleaved shows .* data.shuffle_frames"):
        replace(renderer, shuffle_frames=True)
    with pytest.raises(ValueError, match=r"data.subtitles.words=true writes words behind each other"):
        replace(OPTIONS, words=True)


def test_without_a_source_nothing_is_laid_out(clip):
    row, renderer = shown(clip, ChatReader(64), subtitles=replace(OPTIONS, source=None))
    assert [item.kind for item in renderer(row).media] == ["video"]
