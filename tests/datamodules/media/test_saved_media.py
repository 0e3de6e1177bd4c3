"""Media of completions as plain values."""

import dataclasses
import io
import json

import pytest
import torch

from longrl.datamodules.loading.traces import ShardOfPart
from longrl.datamodules.media.audio import FileSound
from longrl.datamodules.media.media_roots import MediaRoots
from longrl.datamodules.media.remote import RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.saved_media import restored_media, saved_media
from longrl.datamodules.media.sources import DecodeLimits, FileFrames, HeldFrames
from longrl.datamodules.media.video_parts import VideoPart, frame_at
from longrl.types import FULL_SHARD, FrameShard, TemporalPatchSize
from tests.tiny import frames, vl_family

CROP = FileFrames(
    "clips/7.mp4",
    VideoSampling(fps=4.0, span_s=(1.5, 3.0)),
    FrameShard(0, 2),
    TemporalPatchSize(4, (256, 512)),
    DecodeLimits(),
    RemoteMedia("copies", MediaRoots(("/data",))),
)


@pytest.fixture(scope="module")
def media():
    return vl_family().patch(frames(5, 60, 90))


ZOOM = ShardOfPart(VideoPart("clips/7.mp4", frame_at(2.0), True, (0.0, 0.5, 0.25, 1.0), 5000), FrameShard(1, 2), 1)
SOURCES = {"none": None, "frames": CROP, "sound": FileSound("a.wav", FULL_SHARD), "zoom": ZOOM.part, "shard": ZOOM}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_all_but_pixels_comes_back_by_way_of_json_and_of_a_checkpoint(media, source):
    item = dataclasses.replace(media, source=source)
    saved = saved_media(item)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    for read in (saved, json.loads(json.dumps(saved)), torch.load(file, weights_only=True)):
        back = restored_media(read)
        assert dataclasses.replace(back, patches=item.patches) == item
        assert not back.patches.numel()


def test_another_number_of_ranks_decodes_another_shard(media):
    for source in (CROP, ZOOM):
        saved = saved_media(dataclasses.replace(media, source=source))
        assert restored_media(saved, FrameShard(2, 3)).source == dataclasses.replace(source, shard=FrameShard(2, 3))


@pytest.mark.parametrize("source", [HeldFrames(frames(1)), lambda: iter(())], ids=["pixels", "a function"])
def test_what_is_not_plain_is_left_out(media, source):
    assert restored_media(saved_media(dataclasses.replace(media, source=source))).source is None


def test_a_file_names_no_class_that_imports_what_the_file_says(media, tmp_path):
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef score(completion, row): ...\n")
    fields = {"function": f"{tmp_path / 'code.py'}:score"}
    for source in ("longrl.rewards.reward_sum:RewardTerm", "longrl.rewards.signatures:ColumnReward"):
        with pytest.raises(ValueError, match="not restored"):
            restored_media(saved_media(media) | {"source": {"class": source, "fields": fields}})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name",
    ["os:system", "longrl.io.atomic:atomic_write", "longrl.types:no", "longrl.types:dataclass", "longrl.no:one"],
)
def test_a_file_runs_nothing(media, name):
    saved = saved_media(media) | {"source": {"class": name, "fields": {}}}
    with pytest.raises(ValueError, match=r"not restored|no saved media"):
        restored_media(saved)
