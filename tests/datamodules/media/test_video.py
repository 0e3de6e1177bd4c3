import contextlib
import os
import pickle
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.types import UnusableSample

ALL = VideoSampling(fps=None, num_frames=768)


def write(path, count=20, *, size=(64, 48), times_ms=None, rate=10, codec="libx264", pix_fmt="yuv420p", **options):
    """A video whose frame i is grey of level 10 + 3 i (and noise if asked for), at the given times or at `rate`.

    `matrix` is its display matrix, a, b, c, d; see `orientation_of`. `draw` makes other pictures.
    """
    matrix = options.pop("matrix", None)
    noise = np.random.default_rng(0) if options.pop("noise", False) else None
    draw = options.pop("draw", None)
    if times_ms:
        options.setdefault("bf", "0")
    movflags = {"movflags": options.pop("movflags", "0")} if str(path).endswith("mp4") else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=rate, options={k.replace("_", "-"): v for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        if matrix is not None:
            stream.set_display_matrix(display_matrix(*matrix))
        if times_ms:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if count == 0:
            container.start_encoding()
        for index in range(count):
            image = np.full((size[1], size[0], 3), (10 + 3 * index) % 256, np.uint8)
            if draw is not None:
                image = draw(index, *size)
            if noise is not None:
                image = noise.integers(0, 256, image.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
            frame.pts = times_ms[index] if times_ms else index
            if times_ms:
                frame.time_base = Fraction(1, 1000)  # the stream takes another with its first packet
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def display_matrix(a, b, c, d):
    """As a container holds it."""
    return [a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30]


def shown(frames):
    """Which frames of `write` these are."""
    levels = frames.pixels.float().mean(dim=(1, 2, 3))
    return ((levels - 10) / 3).round().int().tolist()


# ---------------------------------------------------------------------------------------------------------- reading


def test_a_span_is_decoded_with_its_own_times_and_key(tmp_path):
    path = write(tmp_path / "v.mp4", 40)  # 4 s, frame i of level 10 + 3 i
    part, whole = read_video(path, VideoSampling(span_s=(1.0, 3.0), fps=1.0, min_frames=2)), read_video(path, ALL)
    assert part.timestamps == (1.5, 2.5)
    assert torch.equal(part.pixels, whole.pixels[[15, 25]])
    assert part.key == read_video(path, VideoSampling(span_s=(1.0, 3.0), fps=None, num_frames=2, min_frames=1)).key
    with pytest.raises(UnusableSample, match=r"it ends after 4\.0 s, before the part from 5 s on"):
        read_video(path, VideoSampling(span_s=(5.0, 6.0)))
    with pytest.raises(ValueError, match="span_s must be two increasing seconds from 0 on"):
        VideoSampling(span_s=(3.0, 1.0))


def test_pixels_and_times_are_those_of_the_sampled_frames(tmp_path):
    frames = read_video(write(tmp_path / "v.mp4", 40), VideoSampling(fps=2.0))
    assert (frames.kind, frames.pixels.dtype, tuple(frames.pixels.shape)) == ("video", torch.uint8, (8, 3, 48, 64))
    assert shown(frames) == [2, 7, 12, 17, 22, 27, 32, 37]
    assert frames.timestamps == pytest.approx([0.2, 0.7, 1.2, 1.7, 2.2, 2.7, 3.2, 3.7])
    assert frames.duration_s == pytest.approx(4.0)


@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.mkv"])
def test_frames_are_exact_with_b_frames_in_the_usual_containers(tmp_path, name):
    path = write(tmp_path / name, 60, bf="3", g="12")
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = read_video(path, VideoSampling(fps=None, num_frames=9))
    for pixels, index in zip(frames.pixels, shown(frames), strict=True):
        assert (pixels.permute(1, 2, 0).numpy() == expected[index]).all()


def test_frames_at_equal_steps_are_decoded_under_a_key_of_their_own(tmp_path):
    path = write(tmp_path / "v.mp4", 20)
    middles = read_video(path, VideoSampling(fps=None, num_frames=4))
    ends = read_video(path, VideoSampling(fps=None, num_frames=4, moments="ends"))
    assert (shown(middles), shown(ends)) == ([2, 7, 12, 17], [0, 6, 12, 19])
    assert ends.timestamps == pytest.approx((0.0, 0.6, 1.2, 1.9))
    assert ends.key != middles.key
    # Features go by the frames, whatever rule chose them.
    nearest = VideoSampling(fps=None, num_frames=20, moments="ends", rounding="nearest")
    assert read_video(path, nearest).key == read_video(path, ALL).key


def test_channels_are_red_green_blue(tmp_path):
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=1)
        stream.width = stream.height = 32
        image = np.zeros((32, 32, 3), np.uint8)
        image[..., 0] = 250
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode(None))
    red, green, blue = read_video(tmp_path / "v.mp4", ALL).pixels[0].float().mean(dim=(1, 2)).tolist()
    assert red > 230
    assert max(green, blue) < 20


def test_odd_sizes_are_kept(tmp_path):
    frames = read_video(write(tmp_path / "v.mp4", 8, size=(113, 87), pix_fmt="yuv444p"), ALL)
    assert tuple(frames.pixels.shape) == (8, 3, 87, 113)
    assert shown(frames) == list(range(8))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_variable_frame_rate_keeps_its_times(tmp_path, name):
    times_ms = [0, 1000, 2000, 3000, *range(4000, 8000, 100)]
    path = write(tmp_path / name, len(times_ms), times_ms=times_ms)
    frames = read_video(path, VideoSampling(fps=None, num_frames=8))
    # the file does not say how long the last frame stays, so the end may be up to a frame early
    assert frames.duration_s == pytest.approx(8.0, abs=0.1)
    assert frames.timestamps == pytest.approx([0.0, 1.0, 2.0, 3.0, 4.4, 5.4, 6.4, 7.4], abs=0.101)
    assert [times_ms[index] / 1000 for index in shown(frames)] == pytest.approx(frames.timestamps)


@pytest.mark.parametrize(
    ("count", "sampling"),
    [
        (1, VideoSampling(fps=2.0, min_frames=4)),
        (3, VideoSampling(fps=2.0, min_frames=4)),
        (9, VideoSampling(fps=None, num_frames=16)),
        (31, VideoSampling(fps=None, num_frames=32)),
    ],
)
def test_a_video_of_few_frames_gives_them_all(tmp_path, count, sampling):
    frames = read_video(write(tmp_path / "v.mp4", count), sampling)
    assert shown(frames) == list(range(count))
    assert len(frames.timestamps) == count


def test_a_video_that_starts_late_is_timed_from_its_first_frame(tmp_path):
    frames = read_video(write(tmp_path / "v.mp4", 10, times_ms=[5000 + 100 * i for i in range(10)]), ALL)
    assert frames.timestamps == pytest.approx([0.1 * i for i in range(10)])


def test_the_key_follows_content_and_choice_of_frames_not_the_path(tmp_path):
    path = write(tmp_path / "a.mp4")
    copy = tmp_path / "b.mp4"
    copy.write_bytes(path.read_bytes())
    two, five = VideoSampling(fps=2.0), VideoSampling(fps=5.0)
    assert read_video(path, two).key == read_video(copy, two).key
    assert read_video(path, two).key != read_video(path, five).key
    write(copy, 21)
    assert read_video(path, two).key != read_video(copy, two).key


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
def test_the_reader_leaves_no_file_open(tmp_path):
    path = write(tmp_path / "v.mp4")
    read_video(path, ALL)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        read_video(path, ALL)
    assert len(os.listdir("/proc/self/fd")) == before


# ----------------------------------------------------------------------------------------------------- broken videos


def refused(path, message):
    with pytest.raises(UnusableSample, match=message) as caught:
        read_video(path, ALL)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_a_missing_file_is_named(tmp_path):
    refused(tmp_path / "none.mp4", "does not exist")


def test_a_folder_and_an_empty_file_are_refused(tmp_path):
    refused(tmp_path, "cannot be opened")
    (tmp_path / "empty.mp4").touch()
    refused(tmp_path / "empty.mp4", "is empty")


def test_something_else_than_a_video_is_refused(tmp_path):
    (tmp_path / "text.mp4").write_text("Good morning. " * 50)
    refused(tmp_path / "text.mp4", "cannot be decoded")


def test_a_file_without_its_index_is_refused(tmp_path):
    path = write(tmp_path / "v.mp4")
    path.write_bytes(path.read_bytes()[:-600])
    refused(path, "cannot be decoded")


def test_a_file_with_a_hole_is_refused(tmp_path):
    path = write(tmp_path / "v.mp4", 60, noise=True, movflags="faststart")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) * 3 // 4] = bytes(len(content) * 3 // 4 - len(content) // 2)
    path.write_bytes(content)
    refused(path, "cannot be decoded")


def test_damage_is_not_painted_over(tmp_path):
    """Of files with flipped bits, a decoder left to itself shows most with wrong pixels and without a word."""
    path = write(tmp_path / "v.mp4", 40, noise=True, bf="2", g="10")
    content, whole = path.read_bytes(), read_video(path, ALL).pixels
    chance = random.Random(0)
    wrong_alone = wrong = 0
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[chance.randrange(len(content) // 10, len(content) * 9 // 10)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(av.FFmpegError), av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            wrong_alone += not np.array_equal(np.stack(frames), whole.permute(0, 2, 3, 1).numpy())
        with contextlib.suppress(UnusableSample):
            wrong += not torch.equal(read_video(path, ALL).pixels, whole)
    assert wrong_alone > 30
    assert wrong < wrong_alone / 2


def test_a_file_without_frames_is_refused(tmp_path):
    refused(write(tmp_path / "v.mp4", 0), "cannot be decoded")


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    refused(tmp_path / "a.mp4", "cannot be decoded")


def test_frames_without_times_are_refused(tmp_path):
    refused(write(tmp_path / "v.h264", bf="2"), "no increasing times.*ffmpeg -i IN -c:v libx264 .* OUT.mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_refused_before_anyone_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "the file is empty")


def test_the_error_survives_the_way_out_of_a_loader_worker():
    error = pickle.loads(pickle.dumps(UnusableSample("a.mp4", "the file is empty")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "the file is empty", "a.mp4: the file is empty")
