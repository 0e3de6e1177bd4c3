"""The cache on disk in front of the encoder: which features are read, encoded and written, on one rank and several."""

import dataclasses
import logging
import os

import pytest
import torch

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.features.cache import FeatureCache
from longrl.features.disk_cache import DiskCache
from longrl.modules.policy import PolicyModule
from longrl.strategies.axis import Axis
from longrl.strategies.parallel import Parallel
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import FrameShard
from tests.distributed import run_distributed
from tests.tiny import frames, held, row, text_family, vl_family

LARGE = 1 << 40


def files_in(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def prompt(family, *keys, size=56, count=4, shard=None):
    media = [frames(count, size, size, key) for key in keys]
    return family.render(row("+".join(keys)), "What?", [held(item, shard) for item in media] if shard else media)


def features(family, folder, **options):
    return FeatureCache(family, disk=DiskCache(family, str(folder), LARGE), **options)


def count_calls(family, model):
    calls = []
    family.media_encoders(model)[0].register_forward_hook(lambda *args: calls.append(1))
    return calls


def test_a_second_run_encodes_nothing_and_reads_the_same_bits(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    model, prompts = family.build(), [prompt(family, "a", "b"), prompt(family, "b", "c")]
    fresh = FeatureCache(family).get_or_encode(model, prompts)
    calls = count_calls(family, model)
    for wanted_calls in (3, 3):
        found = features(family, tmp_path).get_or_encode(model, prompts)
        assert len(calls) == wanted_calls
        assert found.keys() == fresh.keys()
        assert all(torch.equal(found[key], fresh[key]) for key in fresh)
    assert len(files_in(tmp_path)) == 3


def test_a_damaged_file_is_encoded_again_and_replaced(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    model, item = family.build(), prompt(family, "a")
    fresh = features(family, tmp_path).get_or_encode(model, [item])
    (file,) = files_in(tmp_path)
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    cache, calls = features(family, tmp_path), count_calls(family, model)
    found = cache.get_or_encode(model, [item])
    assert all(torch.equal(found[key], fresh[key]) for key in fresh)
    assert len(calls) == 1
    assert cache.metrics()["throughput/features_broken"] == 1
    features(family, tmp_path).get_or_encode(model, [item])
    assert len(calls) == 1


def test_autocast_has_files_of_its_own(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    model, item = family.build(), prompt(family, "a")
    calls = count_calls(family, model)
    (plain,) = features(family, tmp_path).get_or_encode(model, [item]).values()
    with torch.autocast("cpu", torch.bfloat16):
        (cast,) = features(family, tmp_path).get_or_encode(model, [item]).values()
    assert (plain.dtype, cast.dtype) == (torch.float32, torch.bfloat16)
    assert len(calls) == 2


def test_other_frames_or_sizes_or_decoders_have_other_keys(tmp_path, monkeypatch):
    import av

    generate_videos(tmp_path / "videos", SyntheticConfig(1, 0, scene_s=2.0, size=112))
    path = next((tmp_path / "videos").rglob("*.mp4"))

    def key(fps=1.0, max_pixels=112 * 112, **sampling):
        family = vl_family(freeze_vision_encoder=True, max_pixels=max_pixels)
        return family.patch(read_video(path, VideoSampling(fps=fps, **sampling))).key

    keys = {key(), key(fps=2.0), key(max_frames=6), key(max_pixels=56 * 56)}
    assert len(keys) == 4
    assert key() in keys
    monkeypatch.setattr(av, "__version__", "0.7")
    assert key() not in keys


def test_metrics_tell_hits_bytes_and_seconds(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    model, cache = family.build(), features(family, tmp_path)
    assert FeatureCache(family).metrics() == {}
    cache.get_or_encode(model, [prompt(family, "a", "b")])
    cold = cache.metrics()
    assert (cold["throughput/feature_hit_rate"], cold["throughput/features_from_disk"]) == (0.0, 0)
    assert cold["throughput/feature_written_mib"] > 0
    warm = features(family, tmp_path)
    warm.get_or_encode(model, [prompt(family, "a", "c")])
    found = warm.metrics()
    assert (found["throughput/feature_hit_rate"], found["throughput/features_from_disk"]) == (0.5, 1)
    assert found["throughput/feature_read_mib"] > 0
    assert found["time/feature_read"] > 0
    assert warm.metrics()["throughput/feature_hit_rate"] == 1.0


# ---- teams ----


def in_a_team(folders, keys):
    """A rank of a team encodes or reads `keys`, with a folder of its own."""
    sp_group = Axis.of(None)
    family = vl_family(freeze_vision_encoder=True)
    model = family.build()
    calls = count_calls(family, model)
    disk = DiskCache(family, str(folders[sp_group.rank]), LARGE)
    cache = FeatureCache(family, parallel=Parallel(world=sp_group, sp_group=sp_group), disk=disk)
    found = cache.get_or_encode(
        model, [prompt(family, key, shard=FrameShard(sp_group.rank, sp_group.size)) for key in keys]
    )
    return {key: value.clone() for key, value in found.items()}, len(calls), cache.num_encoded


@pytest.mark.slow
def test_a_team_encodes_what_one_of_its_ranks_lacks_and_only_that_rank_writes(tmp_path):
    own, keys = [tmp_path / "0", tmp_path / "1"], ["a", "b", "c"]
    (fresh, _, _), (other, _, _) = run_distributed(in_a_team, 2, [tmp_path / "all"] * 2, keys)
    assert all(torch.equal(fresh[key], other[key]) for key in fresh)
    assert len(files_in(tmp_path / "all")) == 3  # each by one of the ranks

    for folder in own:
        folder.mkdir()
        for file in files_in(tmp_path / "all"):
            os.link(file, folder / file.name)
    lost = files_in(own[1])[1]
    lost.unlink()
    untouched = {file: file.stat().st_ino for file in files_in(own[0])}
    for num_encoded in (1, 0):
        for found, calls, encoded in run_distributed(in_a_team, 2, own, keys):
            assert (calls, encoded) == (num_encoded, num_encoded)
            assert all(torch.equal(found[key], fresh[key]) for key in fresh)
    assert lost.exists()
    assert untouched == {file: file.stat().st_ino for file in files_in(own[0])}


# ---- refusals ----


def test_a_tower_that_trains_is_refused(tmp_path):
    policy = PolicyModule(vl_family(freeze_vision_encoder=False), feature_cache_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"feature_cache_dir keeps .*, but Qwen2_5_VLFamily trains it; .*freeze_vision_encoder=true"
    ):
        policy.configure_model()


def test_a_family_that_does_not_say_what_decides_its_features_is_refused():
    with pytest.raises(ValueError, match=r"decides the features of TextFamily; define its `encoder_settings`"):
        text_family().encoder_settings()


def test_a_text_model_has_no_use_for_it(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        PolicyModule(text_family(), feature_cache_dir=str(tmp_path)).configure_model()
    assert "has no effect: TextFamily reads text only" in caplog.text


# ---- videos that are not decoded ----


def test_left_out_frames_are_read_when_the_file_proves_broken(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    model, item = family.build(), prompt(family, "a")
    fresh = features(family, tmp_path).get_or_encode(model, [item])
    (medium,) = item.media
    empty = dataclasses.replace(medium, patches=medium.patches[:0], source=lambda: iter([frames(4, key="a")]))
    left_out = dataclasses.replace(item, media=(empty,))
    found = features(family, tmp_path).get_or_encode(model, [left_out])
    files_in(tmp_path)[0].write_bytes(b"broken")
    again = features(family, tmp_path).get_or_encode(model, [left_out])
    assert all(torch.equal(found[key], fresh[key]) and torch.equal(again[key], fresh[key]) for key in fresh)
    files_in(tmp_path)[0].unlink()
    changed = dataclasses.replace(empty, source=lambda: iter([frames(4, key="other")]))
    with pytest.raises(ValueError, match="a media item changed while it was in use"):
        features(family, tmp_path).get_or_encode(model, [dataclasses.replace(item, media=(changed,))])
