"""Features on disk: never another medium's, another encoder's or a damaged file's, whoever else writes or dies."""

import dataclasses
import errno
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open

from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.video import read_video
from longrl.features import disk as disk_cache
from longrl.features.cache import FeatureCache
from longrl.features.disk import DiskCache
from longrl.features.provenance import provenance
from longrl.features.stored import StoredFeatures
from longrl.modules.policy import PolicyModule
from longrl.strategies.axis import Axis
from longrl.strategies.parallel import Parallel
from longrl.testing.synthetic import SyntheticConfig, generate
from longrl.types import FrameShard
from tests.distributed import run_distributed
from tests.runs import ROOT
from tests.tiny import frames, held, row, text_family, vl_family

LARGE = 1 << 40
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["longrl", "longrl.modules.policy", "longrl.models.qwen_vl", "tests.tiny"])


def tensor(seed=0, rows=7, dtype=torch.float32):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_in(folder, provenance="p", max_bytes=LARGE):
    return DiskCache(folder, provenance, max_bytes)


def files_in(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


# ---- one file ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_bit_for_bit(tmp_path, dtype):
    wanted = tensor(dtype=dtype)
    size = cache_in(tmp_path).write("k", wanted, 1.25)
    found = cache_in(tmp_path).read("k")
    assert torch.equal(found.features, wanted)
    assert found.features.dtype == dtype
    assert (found.encode_s, found.num_bytes) == (1.25, size)
    assert cache_in(tmp_path).num_bytes() == size


def test_a_file_says_what_it_holds(tmp_path):
    cache = cache_in(tmp_path)
    cache.write("k", tensor(), 0.5)
    with safe_open(cache.path("k"), "pt") as file:
        found = file.metadata()
    assert len(found.pop("sha256")) == 64
    assert found == {
        "key": "k", "provenance": "p", "shape": "[7, 5]", "dtype": "torch.float32", "encode_s": "0.500000"
    }  # fmt: skip


def test_another_key_or_provenance_is_absent(tmp_path):
    cache_in(tmp_path).write("k", tensor(), 0.0)
    assert cache_in(tmp_path).read("other") is None
    assert cache_in(tmp_path, "q").read("k") is None


@pytest.mark.parametrize(("key", "provenance", "told"), [("other", "p", "key"), ("k", "q", "provenance")])
def test_a_file_in_anothers_place_is_not_taken_for_it(tmp_path, caplog, key, provenance, told):
    cache, other = cache_in(tmp_path), cache_in(tmp_path, provenance)
    cache.write("k", tensor(), 0.0)
    os.rename(cache.path("k"), other.path(key))
    assert other.has(key)
    assert other.read(key) is None
    assert other.num_broken == 1
    assert f"its {told} is" in caplog.text


def test_no_bit_of_a_file_can_flip_unnoticed(tmp_path, caplog):
    """At 400 random places: the file is refused, or (in what only pads the header) the features are right."""
    cache, wanted, draw = cache_in(tmp_path), tensor(), random.Random(0)
    cache.write("k", wanted, 1.0)
    whole, caught = cache.path("k").read_bytes(), 0
    for _ in range(400):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        cache.path("k").write_bytes(data)
        found = cache.read("k")
        caught += found is None
        assert found is None or (torch.equal(found.features, wanted) and found.encode_s == 1.0)
    assert cache.num_broken == caught >= 395
    cache.path("k").write_bytes(whole)
    assert torch.equal(cache.read("k").features, wanted)


def test_a_truncated_or_lengthened_file_is_encoded_again(tmp_path):
    cache = cache_in(tmp_path)
    cache.write("k", tensor(), 1.0)
    whole = cache.path("k").read_bytes()
    for data in (*(whole[:size] for size in range(0, len(whole), 7)), whole + b"x"):
        cache.path("k").write_bytes(data)
        assert cache.read("k") is None


# ---- the limit ----


def test_the_least_recently_used_are_evicted_in_order(tmp_path):
    cache = cache_in(tmp_path)
    size = cache.write("a", tensor(), 0.0)
    cache.write("b", tensor(), 0.0)
    cache.write("c", tensor(), 0.0)
    for age, key in enumerate("cba"):
        os.utime(cache.path(key), (1000 - age, 1000 - age))
    small = cache_in(tmp_path, max_bytes=3 * size + 10)
    assert small.read("a") is not None  # now b is the oldest
    small.write("d", tensor(), 0.0)
    assert [small.has(key) for key in "abcd"] == [True, False, True, True]
    small.write("e", tensor(), 0.0)
    assert [small.has(key) for key in "abcde"] == [True, False, False, True, True]
    assert small.num_evicted == 2
    assert small.num_bytes() <= small.max_bytes


def test_what_is_larger_than_the_limit_is_not_written(tmp_path, caplog):
    cache = cache_in(tmp_path, max_bytes=100)
    assert cache.write("a", tensor(), 0.0) == cache.write("b", tensor(), 0.0) == 0
    assert files_in(tmp_path) == []
    assert caplog.text.count("model.feature_cache_disk_bytes=100; raise it") == 1


# ---- many processes ----


def write_and_read(folder, worker, max_bytes, results):
    """40 rounds on 6 keys that all share and 2 of its own."""
    cache, draw, wrong = cache_in(folder, max_bytes=max_bytes), random.Random(worker), 0
    for turn in range(40):
        number = draw.choice([0, 1, 2, 3, 4, 5, 10 + worker, 20 + worker])
        found = cache.read(f"k{number}")
        if found is None:
            cache.write(f"k{number}", tensor(number, rows=2000), float(turn))
        else:
            wrong += not torch.equal(found.features, tensor(number, rows=2000))
    results.put((wrong, cache.num_broken, cache._paused_until))


@pytest.mark.slow
@pytest.mark.parametrize("max_bytes", [LARGE, 250_000])
def test_eight_writers_at_once_leave_whole_files(tmp_path, max_bytes):
    """250 kB hold six of the 22 files: all evict, each other's too."""
    results = SPAWN.Queue()
    workers = [SPAWN.Process(target=write_and_read, args=(tmp_path, n, max_bytes, results)) for n in range(8)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(30)
    assert found == [(0, 0, 0.0)] * 8
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())
    cache = cache_in(tmp_path)
    numbers = [*range(6), *range(10, 18), *range(20, 28)]
    stored = {number: cache.read(f"k{number}") for number in numbers}
    assert all(torch.equal(s.features, tensor(n, rows=2000)) for n, s in stored.items() if s)
    assert cache.num_broken == 0


KILLED = """
import os, sys
from pathlib import Path
import torch
from longrl.features import disk as disk_cache
cache = disk_cache.DiskCache(sys.argv[1], "p", 1 << 40)
real = os.fsync
def stall(fd):
    os.ftruncate(fd, os.fstat(fd).st_size // 2)
    print("writing", flush=True)
    sys.stdin.read()
os.fsync = stall
cache.write("k", torch.ones(1000, 5), 0.0)
"""


def test_kill_9_in_mid_write_leaves_what_was_there_and_its_rest_is_cleaned_up(tmp_path, monkeypatch):
    cache_in(tmp_path).write("k", tensor(), 1.0)
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    (rest,) = tmp_path.glob(".*.tmp")
    assert torch.equal(cache_in(tmp_path).read("k").features, tensor())

    live = tmp_path / ".live.tmp"
    live.write_bytes(b"x")
    cache_in(tmp_path).write("a", tensor(), 0.0)
    assert rest.exists()  # it may still be written to
    os.utime(rest, (1, time.time() - disk_cache.STALE_AFTER_S - 1))
    cache_in(tmp_path).write("b", tensor(), 0.0)
    assert not rest.exists()
    assert live.exists()


# ---- folders that cannot be written to ----


def test_a_full_disk_is_told_once_and_tried_again_later(tmp_path, caplog, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cache_in(tmp_path)
    cache.write("old", tensor(), 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(disk_cache.os, "fsync", full)
        assert cache.write("a", tensor(), 0.0) == cache.write("b", tensor(), 0.0) == 0
    assert caplog.text.count("cannot be written to model.feature_cache_dir=") == 1
    assert "No space left on device" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [cache.path("old").name]
    assert cache.read("old") is not None
    assert cache.write("a", tensor(), 0.0) == 0  # it waits
    monkeypatch.setattr(disk_cache, "RETRY_AFTER_S", 0.0)
    cache._paused_until = 0.0
    assert cache.write("a", tensor(), 0.0) > 0


def test_a_folder_to_read_only_is_read(tmp_path, caplog, monkeypatch):
    """Permissions do not bind root, so the refusals are played."""

    def refuse(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    cache_in(tmp_path).write("k", tensor(), 0.0)
    monkeypatch.setattr(disk_cache, "atomic_write", refuse)
    monkeypatch.setattr(disk_cache.os, "utime", refuse)
    cache = cache_in(tmp_path)
    assert cache.read("k") is not None
    assert cache.write("a", tensor(), 0.0) == 0
    assert "(Read-only file system)" in caplog.text
    assert "name a folder that can be written to" in caplog.text


def test_a_file_for_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"model\.feature_cache_dir must be a folder .* got '.*file'.*name another"):
        cache_in(tmp_path / "file")


# ---- with the feature cache ----


def prompt(family, *keys, size=56, count=4, share=None):
    media = [frames(count, size, size, key) for key in keys]
    return family.render(row("+".join(keys)), "What?", [held(item, share) for item in media] if share else media)


def features(family, folder, **options):
    return FeatureCache(family, stored=StoredFeatures(family, str(folder), LARGE), **options)


def count_calls(family, model):
    calls = []
    family.vision_encoder(model).register_forward_hook(lambda *args: calls.append(1))
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


def test_other_weights_of_tower_or_projector_another_dtype_or_class_are_another_provenance():
    class Other(type(vl_family())):
        pass

    family = vl_family(freeze_vision_encoder=True)
    seen = {provenance(family, family.build())}
    assert provenance(family, family.build()) in seen
    for name in ("patch_embed.proj.weight", "merger.mlp.2.bias"):  # the projector is the encoder's merger
        model = family.build()
        with torch.no_grad():
            dict(family.vision_encoder(model).named_parameters())[name].view(-1)[0] += 1e-3
        seen.add(provenance(family, model))
    seen.add(provenance(family, family.build().to(torch.bfloat16)))
    other = Other(family.model_path, random_init=True)
    seen.add(provenance(other, other.build()))
    darker = vl_family(freeze_vision_encoder=True)
    darker.processor.video_processor.image_mean = (0.1, 0.1, 0.1)
    seen.add(provenance(darker, darker.build()))
    assert len(seen) == 6


def test_text_weights_do_not_count():
    family = vl_family(freeze_vision_encoder=True)
    before, model = provenance(family, family.build()), family.build()
    with torch.no_grad():
        family.backbone(model).layers[0].mlp.up_proj.weight += 1
    assert provenance(family, model) == before


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

    generate(tmp_path / "videos", SyntheticConfig(1, 0, scene_s=2.0, size=112))
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
    stored = StoredFeatures(family, str(folders[sp_group.rank]), LARGE)
    cache = FeatureCache(family, parallel=Parallel(world=sp_group, sp_group=sp_group), stored=stored)
    found = cache.get_or_encode(
        model, [prompt(family, key, share=FrameShard(sp_group.rank, sp_group.size)) for key in keys]
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
    with pytest.raises(ValueError, match="a medium changed while it was in use"):
        features(family, tmp_path).get_or_encode(model, [dataclasses.replace(item, media=(changed,))])
