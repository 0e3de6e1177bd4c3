"""Sound files and sound tracks: formats, rates, channels, time, and what is broken."""

import numpy as np
import pytest
import torch

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media.audio import read_sound
from longrl.datamodules.media.sampling import VideoSampling
from longrl.features.cache import patched_parts
from longrl.types import Row, UnusableSample
from tests.sounds import tone, write_clip, write_sound
from tests.tiny import omni_family, vl_family


@pytest.mark.parametrize(("suffix", "within"), [("wav", 1e-4), ("flac", 1e-4), ("mp3", 5e-2)])
def test_formats_are_decoded(tmp_path, suffix, within):
    path = write_sound(tmp_path / f"a.{suffix}", tone(1.5, 300))
    sound = read_sound(path)
    assert sound.waveform.dtype == torch.float32
    assert sound.num_samples == len(sound.waveform) == pytest.approx(24_000, abs=1200)  # an mp3 has whole frames
    middle = slice(4000, 20_000)
    assert float((sound.waveform[middle] - torch.from_numpy(tone(1.5, 300))[middle]).abs().max()) < within


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    sound = read_sound(write_sound(tmp_path / "a.wav", tone(2.0, 300, rate), rate))
    assert abs(sound.num_samples - 32_000) <= 1
    middle = slice(8000, 24_000)
    assert float((sound.waveform[middle] - torch.from_numpy(tone(2.0, 300))[middle]).abs().max()) < 5e-3


def test_two_channels_become_their_mean(tmp_path):
    left, right = tone(1.0, 300), tone(1.0, 700)
    sound = read_sound(write_sound(tmp_path / "a.wav", np.stack([left, right]), layout="stereo"))
    torch.testing.assert_close(sound.waveform, torch.from_numpy((left + right) / 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_time_0_is_the_first_frame_of_the_video(tmp_path, late_s):
    sound = read_sound(write_clip(tmp_path / "a.mkv", 3.0, 2.0, late_s))
    first = int((sound.waveform.abs() > 0.05).nonzero()[0])
    assert first == pytest.approx(16_000 * late_s, abs=20)
    assert sound.num_samples == pytest.approx(16_000 * (2.0 + late_s), abs=20)


def test_a_track_of_an_mp4_starts_where_its_video_does(tmp_path):
    """Its codec puts 1024 samples in front, which are no part of the sound."""
    sound = read_sound(write_clip(tmp_path / "a.mp4", 3.0, 2.0))
    first = int((sound.waveform.abs() > 0.05).nonzero()[0])
    assert first < 100
    assert sound.num_samples == pytest.approx(32_000, abs=1100)


def test_keys_follow_the_content(tmp_path):
    one, other = (write_sound(tmp_path / f"{name}.wav", tone(1.0, 300 + 100 * name)) for name in range(2))
    same = tmp_path / "same.wav"
    same.write_bytes(one.read_bytes())
    assert read_sound(one).key == read_sound(same).key != read_sound(other).key


# ---- what cannot be read ----


def broken(folder, kind):
    path = folder / "a.wav"
    write_sound(path, tone(30.0))
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no sound at all " * 100)
    elif kind == "torn":
        path.write_bytes(content[: len(content) // 3])
    elif kind == "torn flac":
        path = write_sound(folder / "a.flac", tone(30.0))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    elif kind == "short":
        write_sound(path, tone(0.05))
    elif kind == "mute":
        path = write_clip(folder / "a.mp4", 2.0)
    elif kind == "missing":
        path.unlink()
    return path


KINDS = {
    "empty": "the file is empty",
    "text": "cannot be decoded",
    "torn": "it has 320026 bytes, though its header says 960078: it is torn",
    "torn flac": "cannot be decoded|its sound ends after",
    "short": r"it has 0\.050 s of sound, less than 0\.1 s",
    "mute": "it has no sound track; .*use_audio_in_video=false",
    "missing": "does not exist",
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_broken_sound_says_why(tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(UnusableSample, match=KINDS[kind]):
        read_sound(path)


def renderer(family, **options):
    return RowRenderer(family, VideoSampling(fps=2.0), question_template="{problem}", **options)


def test_a_row_with_broken_sound_is_skipped(tmp_path):
    with pytest.raises(UnusableSample, match="the file is empty"):
        renderer(omni_family())(Row("a", "Which?", "A", audios=(str(broken(tmp_path, "empty")),)))


def test_a_video_without_a_track_is_skipped_where_tracks_are_asked_for(tmp_path):
    mute = Row("a", "Which?", "A", videos=(str(broken(tmp_path, "mute")),))
    with pytest.raises(UnusableSample, match="no sound track"):
        renderer(omni_family(use_audio_in_video=True))(mute)
    assert [item.kind for item in renderer(omni_family())(mute).media] == ["video"]


def test_a_family_that_reads_no_sound_refuses_it(tmp_path):
    path = write_sound(tmp_path / "a.wav", tone(1.0))
    with pytest.raises(UnusableSample, match="Qwen2_5_VLFamily reads no sound; use .*QwenOmniFamily"):
        renderer(vl_family())(Row("a", "Which?", "A", audios=(str(path),)))


# ---- prompts ----


def test_tracks_and_sounds_come_in_the_order_of_the_tags(tmp_path):
    clip, beep = write_clip(tmp_path / "v.mp4", 3.0, 2.5), write_sound(tmp_path / "a.wav", tone(1.0))
    family = omni_family(use_audio_in_video=True)
    row = Row("a", "<audio> in <video>?", "A", videos=(str(clip),), audios=(str(beep),))
    media = renderer(family)(row).media
    assert [(item.kind, item.is_video_track) for item in media] == [("audio", False), ("video", False), ("audio", True)]
    assert media[1].sound_tokens == family.num_features(media[2])
    text = family.tokenizer.decode(renderer(family)(row).input_ids)
    assert text.index("<|audio_bos|>") < text.index(" in <|vision_bos|><|audio_bos|>")
    assert text.count("<|audio_bos|>") == 2


def test_a_blind_model_hears_nothing(tmp_path):
    clip, beep = write_clip(tmp_path / "v.mp4", 3.0, 2.5), write_sound(tmp_path / "a.wav", tone(1.0))
    row = Row("a", "<audio> in <video>?", "A", videos=(str(clip),), audios=(str(beep),))
    assert renderer(omni_family(use_audio_in_video=True), blind=True)(row).media == ()


class Everything:
    """Stands for a cache on disk that holds all features."""

    def has(self, key):
        return True


def test_samples_of_stored_sound_are_let_go_of_and_found_again(tmp_path):
    clip = write_clip(tmp_path / "v.mp4", 3.0, 2.5)
    family = omni_family(use_audio_in_video=True)
    row = Row("a", "Which?", "A", videos=(str(clip),))
    whole, outline = (renderer(family, stored=stored)(row) for stored in (None, Everything()))
    assert torch.equal(whole.input_ids, outline.input_ids)
    assert torch.equal(whole.position_ids, outline.position_ids)
    for made, kept in zip(whole.media, outline.media, strict=True):
        assert made.key == kept.key
        assert len(kept.patches) == 0
        assert torch.equal(torch.cat([piece.patches for piece in patched_parts(family, kept)]), made.patches)
