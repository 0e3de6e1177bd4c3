"""Clips and frames: exact to the frame, whatever the file looks like."""

import itertools

import av
import numpy as np
import pytest
from hypothesis import given, strategies as st

from longrl.commands.main import main
from longrl.datamodules.media.frame_index import FrameIndex
from longrl.io.jsonl import read_jsonl
from longrl.pipeline.cutting import cut_clips, scene_starts
from longrl.pipeline.splitting import find_videos
from longrl.pipeline.video_frames import (
    BrokenVideo,
    FrameSet,
    Times,
    file_digest,
    frame_times,
    middle_frames,
    read_images,
)
from tests.datamodules.media.test_video import display_matrix


def noise(level):
    """Large packets."""
    pixels = np.random.default_rng(level).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")


def grey(level):
    return av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), "rgb24").reformat(format="yuv420p")


def write(path, levels, *, fps=4, codec="libx264", stamps=None, bframes=0, keys=8, options=(), draw=grey, matrix=None):
    """A video whose frame i is grey of level `levels[i]`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        if matrix is not None:
            stream.set_display_matrix(display_matrix(*matrix))
        if codec == "libx264":
            stream.options = {"g": str(keys), "bf": str(bframes), "crf": "5", **dict(options)}
        for i, level in enumerate(levels):
            frame = draw(level)
            frame.pts = stamps[i] if stamps else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def levels(path, indices):
    found = read_images(path, indices, frame_times(path), 64)
    return {index: round(float(np.asarray(image).mean())) for index, image in found.items()}


def times(starts, end_s):
    seconds = np.array(starts, dtype=float)
    return Times(seconds, end_s, FrameIndex(np.arange(len(starts)), seconds, end_s, np.array([0]), (64, 64)))


# ---- times and pixels ----


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("b_frames.mp4", {"bframes": 3, "keys": 20}),
        ("late.mkv", {"stamps": [i + 40 for i in range(40)]}),
        ("vp9.webm", {"codec": "libvpx-vp9"}),
        ("old.avi", {"codec": "mpeg4"}),
        ("b_frames.avi", {"bframes": 3, "keys": 20}),
        ("broadcast.ts", {"bframes": 2}),
        ("flash.flv", {"bframes": 2}),
        ("open_gops.mp4", {"bframes": 3, "options": {"x264-params": "open-gop=1:scenecut=0"}.items()}),
    ],
)
def test_times_and_pixels_are_those_of_the_frame_that_was_asked_for(tmp_path, name, options):
    shades = [20 + 5 * i for i in range(40)]
    path = write(tmp_path / name, shades, **options)
    found = frame_times(path)
    assert found.starts.tolist() == pytest.approx([i / 4 for i in range(40)], abs=2e-3)
    assert found.end_s == pytest.approx(10.0, abs=0.3)
    for index, level in levels(path, [0, 7, 13, 14, 39]).items():
        assert level == pytest.approx(shades[index], abs=4)
    assert len(levels(path, range(40))) == 40


def test_a_webm_without_duration_has_right_times(tmp_path):
    path = tmp_path / "live.webm"
    with av.open(str(path), "w", format="webm", options={"live": "1"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(20):
            frame = grey(9 * i)
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        assert container.duration is None
    assert frame_times(str(path)).end_s == pytest.approx(5.0, abs=0.01)


def test_frames_of_changing_rate_are_found_by_time(tmp_path):
    stamps = [0, 1, 2, 3, 20, 21, 40, 60, 61, 62]
    path = write(tmp_path / "vfr.mkv", [20 * i for i in range(10)], stamps=stamps)
    found = frame_times(path)
    assert found.starts.tolist() == pytest.approx([stamp / 4 for stamp in stamps])
    assert cut_clips(found, 5.0, 2.0) == [(0, 4), (4, 6), (6, 10)]
    assert middle_frames(found, 0, 10, 4) == [3, 5, 6]


def test_broken_frames_are_left_out_and_the_rest_is_right(tmp_path):
    path = write(tmp_path / "x.mkv", [20 + 5 * i for i in range(40)], options={"x264-params": "scenecut=0"}.items())
    content = bytearray((tmp_path / "x.mkv").read_bytes())
    with av.open(path) as container:
        sizes = [(packet.pts, packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = next((pos, size) for pts, pos, size in sizes if pts and 9 < pts * 4 // 1000 < 12)
    content[position + 24 : position + size] = bytes(size - 24)  # not the container's own header
    (tmp_path / "x.mkv").write_bytes(content)
    frame_times.cache_clear()
    found = levels(path, range(40))
    assert 20 <= len(found) < 40
    assert all(found[index] == pytest.approx(20 + 5 * index, abs=4) for index in (*range(8), *range(16, 40)))
    frames = FrameSet(path, file_digest(path), tuple(range(40)), 64)
    assert len(frames.load()) == len(found)  # the others are told to the model as broken
    assert len(frames.parts()) == 80


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_a_file_that_is_no_video_says_so(tmp_path, content):
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"x\.mp4 cannot be read"):
        frame_times(str(path))


def test_names_of_frames_follow_the_content(tmp_path):
    path = write(tmp_path / "a.mp4", range(20))
    frames = FrameSet(path, file_digest(path), (0, 4), 32)
    first, *_ = frames.load().values()
    assert first.startswith("data:image/jpeg;base64,")
    assert [part["text"] for part in frames.parts()[::2]] == ["[0.0 s]", "[1.0 s]"]
    other = FrameSet("elsewhere.mp4", frames.digest, (0, 4), 32)
    assert [frames.url(0), frames.url(4)] == [other.url(0), other.url(4)]
    assert frames.url(0) != FrameSet(path, frames.digest, (0, 4), 64).url(0)


# ---- cutting ----


@given(
    steps=st.lists(st.floats(0.02, 4.0), min_size=1, max_size=80),
    clip_s=st.floats(0.5, 12.0),
    share=st.floats(0.0, 1.0),
    scenes=st.lists(st.integers(0, 80), max_size=10),
)
def test_clips_cover_the_video_without_gap_or_overlap(steps, clip_s, share, scenes):
    edges = [0.0, *itertools.accumulate(steps)]
    shown = times(edges[:-1], edges[-1])
    scenes = sorted({index for index in scenes if 0 < index < len(steps)})
    clips = cut_clips(shown, clip_s, share * clip_s, scenes)
    assert clips[0][0] == 0
    assert clips[-1][1] == len(steps)
    assert all(a[1] == b[0] for a, b in itertools.pairwise(clips))
    assert all(first < stop for first, stop in clips)
    if len(clips) > 1:
        first, stop = clips[-1]
        assert shown.start(stop) - shown.start(first) >= share * clip_s - 1e-5
    if not scenes:
        for first, stop in clips[:-1]:
            assert clip_s - 1e-5 <= shown.start(stop) - shown.start(first) <= clip_s + max(steps) + 1e-5


def test_a_short_last_clip_joins_the_one_before():
    shown = times([i / 4 for i in range(4 * 24)], 24.0)
    assert cut_clips(shown, 10.0, 5.0) == [(0, 40), (40, 96)]
    assert cut_clips(shown, 10.0, 4.0) == [(0, 40), (40, 80), (80, 96)]
    assert cut_clips(times([0.0, 0.5], 1.0), 10.0, 5.0) == [(0, 2)]


def test_scene_changes_are_found_to_the_frame_and_cut_at(tmp_path):
    shades = [40] * 33 + [180] * 45 + [90] * 42
    path = write(tmp_path / "x.mp4", shades)
    shown = frame_times(path)
    scenes = scene_starts(path, shown, 12.0)
    assert scenes == [33, 78]
    assert cut_clips(shown, 10.0, 5.0, scenes) == [(0, 33), (33, 78), (78, 120)]
    assert cut_clips(shown, 10.0, 5.0) == [(0, 40), (40, 80), (80, 120)]


# ---- upright ----

CLOCKWISE = (0, 1, -1, 0)


def bright_top(level):
    """A frame whose upper half is bright."""
    pixels = np.full((64, 64, 3), level, np.uint8)
    pixels[:32] = 240
    return av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="yuv420p")


def test_frames_of_a_turned_video_are_read_upright_and_have_names_of_their_own(tmp_path):
    path = write(tmp_path / "phone.mp4", [20] * 20, draw=bright_top, matrix=CLOCKWISE)
    shown = frame_times(path)
    image = np.asarray(read_images(path, [7], shown, 64)[7])
    assert image[:, 40:].mean() > 220  # the top has come to the right
    assert image[:, :24].mean() < 40
    frames = FrameSet(path, file_digest(path), (7,), 64, shown.index.pixel_rule)
    assert frames.url(7) != FrameSet(path, file_digest(path), (7,), 64).url(7)
    assert list(frames.load()) == [frames.url(7)]


def test_clips_of_a_turned_video_are_written_upright(tmp_path):
    (tmp_path / "videos").mkdir()
    write(tmp_path / "videos" / "phone.mp4", [20] * 60, draw=bright_top, matrix=CLOCKWISE)
    main(["pipeline", "split", f"--videos={tmp_path / 'videos'}", f"--out={tmp_path / 'out'}",
          "--split.write_files=true"])  # fmt: skip
    first, _ = sorted((tmp_path / "out" / "clips").iterdir())
    with av.open(str(first)) as container:
        frame = next(container.decode(video=0))
    assert frame.rotation == 0
    assert frame.to_ndarray(format="rgb24")[:, 40:].mean() > 220


# ---- the step ----


def test_a_torn_video_is_cut_as_far_as_it_goes_and_listed(tmp_path):
    (tmp_path / "videos").mkdir()
    path = write(tmp_path / "videos" / "torn.mkv", range(100), draw=noise)
    content = (tmp_path / "videos" / "torn.mkv").read_bytes()
    (tmp_path / "videos" / "torn.mkv").write_bytes(content[: len(content) // 2])
    frame_times.cache_clear()
    main(["pipeline", "split", f"--videos={tmp_path / 'videos'}", f"--out={tmp_path / 'out'}"])
    clips = read_jsonl(tmp_path / "out" / "1_clips.jsonl")
    assert clips[-1]["end_s"] == pytest.approx(frame_times(path).end_s)
    assert 10 < clips[-1]["end_s"] < 14
    assert "torn" in (tmp_path / "out" / "reports" / "split.json").read_text()


def test_the_step_lists_broken_videos_and_twins_and_goes_on(tmp_path, capsys):
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    write(folder / "a.mp4", range(100))
    write(folder / "deep" / "b.webm", range(0, 200, 2), codec="libvpx-vp9")
    (folder / "broken.mp4").write_bytes(b"x")
    (folder / "twin.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "notes.txt").write_text("no video")
    args = ["pipeline", "split", f"--videos={folder}", f"--out={tmp_path / 'out'}", "--split.write_files=true"]
    with pytest.raises(ValueError, match=r"1 of 4 items of step split failed.*--max_failed_share=0.1"):
        main(args)
    main([*args, "--max_failed_share=0.5"])
    clips = read_jsonl(tmp_path / "out" / "1_clips.jsonl")
    assert [(clip["id"], clip["start_s"], clip["first"], clip["stop"]) for clip in clips] == [
        ("a.mp4#0000", 0.0, 0, 40), ("a.mp4#0001", 10.0, 40, 80), ("a.mp4#0002", 20.0, 80, 100),
        ("deep/b.webm#0000", 0.0, 0, 40), ("deep/b.webm#0001", 10.0, 40, 80), ("deep/b.webm#0002", 20.0, 80, 100),
    ]  # fmt: skip
    assert "same content as another video" in capsys.readouterr().out
    report = (tmp_path / "out" / "reports" / "split.json").read_text()
    assert "broken.mp4" in report
    assert "it is a.mp4 again" in report
    written = sorted((tmp_path / "out" / "clips").iterdir())
    assert [path.name for path in written][:2] == ["a.mp4#0000.mp4", "a.mp4#0001.mp4"]
    assert [len(frame_times(str(path)).starts) for path in written] == [40, 40, 20] * 2


def test_a_list_of_videos_is_read_relative_to_itself(tmp_path):
    (tmp_path / "list.txt").write_text("b.mp4\n\nsub/a.mp4\nb.mp4\n")
    assert find_videos(str(tmp_path / "list.txt")) == [
        ("b.mp4", str(tmp_path / "b.mp4")), ("sub/a.mp4", str(tmp_path / "sub" / "a.mp4")),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--videos=.*has no video"):
        find_videos(str((tmp_path / "empty").mkdir() or tmp_path / "empty"))


def test_what_the_pipeline_made_among_the_videos_is_no_video(tmp_path):
    (tmp_path / "out" / "dataset" / "videos").mkdir(parents=True)
    for name in ("a.mp4", "out/dataset/videos/a.mp4"):
        (tmp_path / name).touch()
    assert [name for name, _ in find_videos(str(tmp_path), tmp_path / "out")] == ["a.mp4"]
