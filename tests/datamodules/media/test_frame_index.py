"""Containers that say little, that begin anywhere, and that were cut off."""

import json

import av
import numpy as np
import pytest
import torch

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media.audio import read_sound
from longrl.datamodules.media.frame_index import PacketTimes, missing_tail_s, trim_broadcast
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.datamodules.media.video import VideoReader, read_frame_index
from longrl.types import UnusableSample
from tests.datamodules.media.test_video import ALL, display_matrix, shown, write
from tests.sounds import tone, write_clip, write_sound
from tests.tiny import row, vl_family

KEEP = VideoSampling(fps=None, num_frames=768, torn="keep")


# ---- broadcasts ----


def recording(folder, name="v.ts", **options):
    codec = {"codec": "mpeg2video"} if name.endswith("mpg") else {}
    return write(folder / name, 60, rate=25, bf="2", g="12", noise=True, **codec, **options)


@pytest.mark.parametrize("name", ["v.ts", "v.mpg"])
def test_a_recording_that_begins_and_ends_anywhere_has_the_frames_between(tmp_path, name):
    whole = read_video(recording(tmp_path, name), ALL)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[len(content) // 4 + 77 : -len(content) // 6])
    part = read_video(tmp_path / name, ALL)
    first = next(i for i, pixels in enumerate(whole.pixels) if torch.equal(pixels, part.pixels[0]))
    assert 0 < first < 30
    assert torch.equal(part.pixels, whole.pixels[first : first + len(part.pixels)])
    assert part.timestamps[0] == 0.0
    assert np.diff(part.timestamps) == pytest.approx(np.full(len(part.pixels) - 1, 0.04))


def test_joined_recordings_are_refused_with_a_command(tmp_path):
    content = recording(tmp_path).read_bytes()
    (tmp_path / "v.ts").write_bytes(content * 2)
    with pytest.raises(UnusableSample, match="times jump back, as where recordings were joined; .*ffmpeg -i IN"):
        read_video(tmp_path / "v.ts", ALL)


def test_only_packets_that_a_key_frame_leads_to_are_kept():
    def packet(pts, dts, is_key=False):
        return PacketTimes(pts, 1, is_key, False, dts, 0)

    packets = [packet(3, 1), packet(2, 2), packet(6, 3, True), packet(4, 4), packet(5, 5), packet(9, 6), packet(7, 7)]
    assert [one.pts for one in trim_broadcast(packets)] == [6, 9, 7]  # 4 and 5 are shown before the key frame
    assert trim_broadcast(packets[:2]) == []
    with pytest.raises(ValueError, match="jump back"):
        trim_broadcast([*packets, packet(8, 2)])


# ---- containers that say little ----


def test_an_avi_with_b_frames_has_the_times_of_its_rate(tmp_path):
    path = write(tmp_path / "v.avi", 40, bf="3", g="12", rate=8)
    frames = read_video(path, ALL)
    assert shown(frames) == list(range(40))
    assert frames.timestamps == pytest.approx([index / 8 for index in range(40)])


def test_a_matroska_without_rate_or_duration_has_the_times_of_its_packets(tmp_path):
    """As browsers record: no default duration, and no length in the header."""
    times_ms = [0, 40, 90, 130, 400, 440, 1500, 1540, 1600, 1650]
    path = write(tmp_path / "v.mkv", 10, times_ms=times_ms)
    content = path.read_bytes()
    for element in (b"\x23\xe3\x83", b"\x44\x89", b"DURATION"):  # DefaultDuration, Duration, and FFmpeg's own tag
        start = content.index(element)
        if element == b"DURATION":
            content = content.replace(element, b"DURABLE_")
            continue
        size = len(element) + 1 + (content[start + len(element)] & 0x7F)
        void = b"\xec" + bytes([0x80 | (size - 2)]) + bytes(size - 2)
        content = content[:start] + void + content[start + size :]
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.duration is None
    frames = read_video(path, ALL)
    assert frames.timestamps == pytest.approx([time / 1000 for time in times_ms])
    assert shown(frames) == list(range(10))
    assert frames.missing_s == 0.0


# ---- transparent pixels ----


def test_transparent_pixels_of_a_video_lie_on_white(tmp_path):
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "rgba"
        stream.set_display_matrix(display_matrix(0, 1, -1, 0))
        for alpha in (0, 128, 255):
            image = np.full((16, 32, 4), (0, 0, 0, alpha), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgba")))
        container.mux(stream.encode(None))
    frames = read_video(path, ALL)
    assert tuple(frames.pixels.shape) == (3, 3, 32, 16)
    assert [pixels.unique().tolist() for pixels in frames.pixels] == [[255], [127], [0]]
    assert (
        read_frame_index(path).pixel_rule == " Orientation(transposed=True, mirrored_x=True, mirrored_y=False) on white"
    )


# ---- torn files ----

TORN = {
    "v.mp4": {"movflags": "faststart"},
    "v.mkv": {},
    "v.webm": {"codec": "libvpx-vp9"},
    "v.avi": {},
    "b.avi": {"bf": "2"},
    "v.flv": {"bf": "2"},
}


def torn(folder, name, share=0.5):
    """What half a download holds of a video of 6 s, and the whole."""
    path = write(folder / name, 60, noise=True, g="12", **TORN[name])
    whole = read_video(path, ALL)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path, whole


@pytest.mark.parametrize("name", TORN)
def test_a_torn_video_is_skipped_in_every_container(tmp_path, name):
    path, _ = torn(tmp_path, name)
    with pytest.raises(UnusableSample, match=r"it is torn: it ends after .* s are missing; data.video.torn=keep"):
        read_video(path, ALL)


@pytest.mark.parametrize("name", TORN)
def test_or_what_is_there_is_sampled_as_a_shorter_video(tmp_path, name):
    path, whole = torn(tmp_path, name)
    part = read_video(path, KEEP)
    assert 20 <= len(part.pixels) <= 40
    assert torch.equal(part.pixels, whole.pixels[: len(part.pixels)])
    assert part.missing_s == pytest.approx(6.0 - part.duration_s, abs=0.5)
    few = read_video(path, VideoSampling(fps=None, num_frames=5, torn="keep"))
    assert few.timestamps[-1] > 0.7 * part.duration_s  # spread over what is there
    assert torch.equal(few.pixels, part.pixels[list(few.indices)])


def test_a_whole_file_is_not_taken_for_a_torn_one(tmp_path):
    """Sound that goes on, and a beginning that was cut off by an edit list, are no tear."""
    for name in TORN:
        assert missing_tail_s(write(tmp_path / name, 30, **TORN[name])) == 0.0
    assert read_frame_index(write_clip(tmp_path / "long_sound.mp4", 2.0, 6.0)).missing_s == 0.0
    assert read_frame_index(write_clip(tmp_path / "long_sound.mkv", 2.0, 6.0)).missing_s == 0.0
    late = write(tmp_path / "late.mp4", 10, times_ms=[5000 + 100 * i for i in range(10)])
    assert read_frame_index(late).missing_s == 0.0


def test_a_frame_in_the_middle_is_damage_whatever_becomes_of_torn_files(tmp_path):
    path = write(tmp_path / "v.mp4", 60, noise=True, movflags="faststart")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) * 3 // 4] = bytes(len(content) * 3 // 4 - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(UnusableSample, match="damaged or missing"):
        read_video(path, KEEP)


def test_torn_sound_is_heard_as_long_as_it_is_where_torn_files_are_kept(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(6.0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnusableSample, match="torn"):
        read_sound(path)
    assert read_sound(path, torn="keep").num_samples == pytest.approx(48_000, abs=2000)


def test_rows_on_torn_videos_are_listed_as_used_in_part(tmp_path):
    path, _ = torn(tmp_path, "v.mp4")
    sound = write(tmp_path / "sound.mp4", 20)
    record = {"problem": "What?", "answer": "x", "task": "exact"}
    records = [record | {"videos": str(path)}, record | {"videos": str(sound)}, record | {"videos": str(path)}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in records))
    for how, num_prompts, used in (("skip", 1, None), ("keep", 3, "in part")):
        data = LongVideoReason(
            vl_family(), test=str(source), video=VideoSampling(torn=how), skipped_dir=str(tmp_path / how)
        )
        data.read(["test"])
        prompts = [prompt for batch in data.eval_loader("test") for prompt in batch.prompts]
        assert len(prompts) == num_prompts
        lines = list(map(json.loads, (tmp_path / how / "skipped.jsonl").read_text().splitlines()))
        assert {(line["path"], line.get("used")) for line in lines} == {(str(path), used)}
        assert len(data.skips("test")) == (2 if how == "skip" else 0)
    assert data.skips("test").torn_videos == {str(path)}
    assert [prompt.torn_videos for prompt in prompts] == [(str(path),), (), (str(path),)]


def test_what_becomes_of_torn_videos_is_part_of_how_rows_are_read():
    renderers = [RowRenderer(vl_family(), VideoSampling(torn=how)) for how in ("skip", "keep")]
    assert len({json.dumps(renderer.identity()) for renderer in renderers}) == 2


# ---- positions at a varying rate ----


def test_positions_of_a_varying_rate_are_even_as_in_the_released_code(tmp_path):
    """Qwen2.5-VL has one number of seconds per temporal patch: that of the mean rate of the frames shown."""
    times_ms = [*range(0, 1000, 40), *range(1000, 9000, 1700)]
    path = write(tmp_path / "v.mkv", len(times_ms), times_ms=times_ms)
    family = vl_family()
    prompt = RowRenderer(family, VideoSampling(fps=None, num_frames=8))(row("a", videos=(str(path),)))
    (item,) = prompt.media
    times = VideoReader(path, VideoSampling(fps=None, num_frames=8)).outline.timestamps
    assert item.seconds_per_temporal_patch == pytest.approx(2 * (times[-1] - times[0]) / 7)
    assert item.timestamps == pytest.approx([sum(times[i : i + 2]) / 2 for i in range(0, 8, 2)])
    is_video = prompt.input_ids == family.media_token_ids()["video"]
    steps = prompt.position_ids[0, is_video].unique().diff()
    assert steps.max() - steps.min() <= 1
