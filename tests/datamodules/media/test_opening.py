"""Files of media from strangers: playlists reach no neighbour, and a bomb costs no more than its limit."""

import dataclasses
import struct
import zlib

import pytest
import torch
from hypothesis import given, settings, strategies as st

from longrl.datamodules.media import opening
from longrl.datamodules.media.audio import read_sound
from longrl.datamodules.media.images import read_image
from longrl.datamodules.media.opening import MediaLimits
from longrl.datamodules.media.sources import DecodeLimits, read_video
from longrl.datamodules.media.video import VideoReader
from longrl.pipeline.video_frames import BrokenVideo, frame_times
from longrl.types import UnusableSample
from tests.datamodules.media.test_video import ALL, write
from tests.sounds import tone, write_sound

PLAYLISTS = {
    "ffconcat": "ffconcat version 1.0\nfile clip.mp4\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.mp4\n#EXT-X-ENDLIST\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><BaseURL>clip.mp4</BaseURL>',
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "smil": "<smil><video src='clip.mp4'/></smil>",
}


def png_of_size(path, width, height):
    """A PNG of a few bytes whose header claims a size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".wav"])
def test_a_playlist_reaches_no_neighbour(tmp_path, kind, suffix):
    write(tmp_path / "clip.mp4", 8)
    named = tmp_path / f"list{suffix}"
    named.write_text(PLAYLISTS[kind])
    for read in (lambda: read_video(named, ALL), lambda: read_sound(named)):
        with pytest.raises(UnusableSample, match=r"its format is none|it cannot be decoded"):
            read()
    with pytest.raises(BrokenVideo):
        frame_times(str(named))


def test_a_name_with_a_colon_is_a_file(tmp_path):
    assert len(read_video(write(tmp_path / "data:10:30.mp4", 4), ALL).pixels) == 4


def test_frames_above_the_limit_are_named_before_any_is_decoded(tmp_path):
    clip = write(tmp_path / "clip.mp4", 4, size=(64, 48))
    with pytest.raises(UnusableSample, match=r"64 x 48 pixels, more than data.media_limits.max_pixels=3000"):
        VideoReader(clip, ALL, limits=MediaLimits(max_pixels=3000))
    assert len(VideoReader(clip, ALL, limits=MediaLimits(max_pixels=64 * 48)).indices) == 4


@pytest.mark.parametrize("side", [100_000, 2**31 - 1])
def test_a_picture_bomb_is_named(tmp_path, side):
    with pytest.raises(UnusableSample, match="max_pixels|exceeds limit|cannot be decoded"):
        read_image(png_of_size(tmp_path / "bomb.png", side, side))


def test_a_picture_above_the_limit_is_named(tmp_path):
    path = png_of_size(tmp_path / "large.png", 9000, 9000)
    with pytest.raises(UnusableSample, match=r"9000 x 9000 pixels, more than data.media_limits.max_pixels=67108864"):
        read_image(path)


def test_pictures_that_run_programs_are_refused(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n8 8 moveto\n")
    with pytest.raises(UnusableSample, match="cannot identify image file"):
        read_image(path)


def test_a_video_above_the_length_is_named(tmp_path):
    hourly = write(tmp_path / "hourly.mp4", 10, times_ms=[3_600_000 * hour for hour in range(10)])
    with pytest.raises(UnusableSample, match=r"it lasts \d+ s, longer than data.media_limits.max_s=7200; cut it"):
        VideoReader(hourly, ALL, limits=MediaLimits(max_s=7200))


def test_a_video_of_too_many_frames_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "MAX_FRAMES", 5)
    with pytest.raises(UnusableSample, match="it has more than 5 frames"):
        VideoReader(write(tmp_path / "clip.mp4", 8), ALL)


def test_decoding_ends_at_its_limit(tmp_path):
    clip = write(tmp_path / "clip.mp4", 30)
    reader = VideoReader(clip, ALL)
    reader._limits = MediaLimits(max_decode_s=1e-5)
    with pytest.raises(UnusableSample, match=r"decoding it takes more than data.media_limits.max_decode_s=1e-05 s"):
        list(reader.chunks(4))


def test_time_between_two_frames_is_not_decoding(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(opening.time, "thread_time", lambda: now[0])
    for _ in VideoReader(write(tmp_path / "clip.mp4", 8), ALL, limits=MediaLimits(max_decode_s=1.0)).chunks(1):
        now[0] += 100.0


def test_sound_ends_at_its_limits(tmp_path):
    path = write_sound(tmp_path / "sound.wav", tone(2.0))
    assert read_sound(path).num_samples == 32_000
    with pytest.raises(UnusableSample, match="data.media_limits.max_s=1; cut it"):
        read_sound(path, limits=MediaLimits(max_s=1))
    with pytest.raises(UnusableSample, match="max_decode_s"):
        read_sound(path, limits=MediaLimits(max_decode_s=1e-6))


def test_large_frames_are_read_a_few_at_once(tmp_path):
    outline = read_video(write(tmp_path / "clip.mp4", 4), ALL)
    assert DecodeLimits().frames_at_once(outline) == 32
    large = dataclasses.replace(outline, pixels=torch.empty(0, 3, 4096, 4096, dtype=torch.uint8))
    assert DecodeLimits().frames_at_once(large) == 5


def test_limits_must_be_above_zero():
    with pytest.raises(ValueError, match=r"data.media_limits.max_decode_s must be above 0, got nan"):
        MediaLimits(max_decode_s=float("nan"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    clip = write(tmp_path_factory.mktemp("whole") / "clip.mp4", 8, movflags="faststart")
    return clip, clip.read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_file_of_any_bytes_is_read_or_unusable(whole, data):
    clip, content = whole
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content), 900) - 4))  # the header, which claims sizes and counts
        damaged[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
    other = clip.with_name("damaged.mp4")
    other.write_bytes(damaged)
    try:
        frames = read_video(other, ALL, limits=MediaLimits(max_pixels=1 << 16, max_decode_s=10))
    except UnusableSample:
        return
    assert frames.pixels[0].numel() <= 3 << 16
