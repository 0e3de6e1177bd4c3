"""A video in chunks is the video at once: for any chunk, share and family, with B-frames and at any frame rate."""

import dataclasses
import functools
import itertools
import json
import multiprocessing
import tempfile
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.datamodules.media import pyav_frames
from longrl.datamodules.media.frame_index import FrameIndex
from longrl.datamodules.media.opening import DecodeClock, MediaLimits
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, FileFrames, HeldFrames, read_video
from longrl.datamodules.media.video import FramePosition, VideoReader, hold_frames
from longrl.features.cache import FeatureCache, regroup_frames
from longrl.models.base import CausalFamily
from longrl.strategies.axis import Axis
from longrl.strategies.parallel import Parallel
from longrl.types import FULL_SHARD, FrameShard, UnusableSample
from tests.datamodules.media.test_video import ALL, shown, write
from tests.distributed import run_distributed
from tests.tiny import internvl_family, qwen3_vl_family, row, vila_family, vl_family

UNEVEN_MS = [0, 1000, 2000, 3000, *range(4000, 8000, 90)]
KINDS = {
    "plain.mp4": {"count": 45},
    "b_frames.mp4": {"count": 60, "bf": "3", "g": "12", "noise": True},
    "open_gops.mp4": {"count": 60, "bf": "3", "g": "15", "flags": "-cgop", "x264_params": "open-gop=1"},
    "uneven.mp4": {"count": len(UNEVEN_MS), "times_ms": UNEVEN_MS, "g": "10"},
    "uneven.mkv": {"count": len(UNEVEN_MS), "times_ms": UNEVEN_MS, "g": "10", "bf": "2"},
    "vp9.webm": {"count": 25, "codec": "libvpx-vp9"},
    "broadcast.ts": {"count": 60, "bf": "2", "g": "12", "rate": 25, "noise": True},
    "open_gops.ts": {"count": 60, "bf": "3", "g": "15", "rate": 25, "flags": "-cgop", "x264_params": "open-gop=1"},
    "program.mpg": {"count": 60, "bf": "2", "g": "12", "rate": 25, "codec": "mpeg2video", "noise": True},
    "flash.flv": {"count": 60, "bf": "2", "g": "12", "noise": True},
    "b_frames.avi": {"count": 60, "bf": "3", "g": "12", "noise": True},
    "mpeg4_b_frames.avi": {"count": 60, "bf": "2", "g": "12", "codec": "mpeg4", "noise": True},
    "windows.wmv": {"count": 60, "g": "12", "codec": "wmv2", "noise": True},
}


@functools.cache
def clip(name):
    kind = dict(KINDS[name])
    return write(Path(tempfile.mkdtemp(prefix="longrl-clip-")) / name, kind.pop("count"), **kind)


@functools.cache
def pictures(name):
    """All frames of a file, decoded in turn by PyAV alone: [N, 3, H, W] in the order shown, which is that of output."""
    with av.open(str(clip(name))) as container:
        return torch.from_numpy(
            np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        ).permute(0, 3, 1, 2)


# ---- chunks ----


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(KINDS)),
    num_frames=st.integers(1, 70),
    chunk=st.integers(1, 80),
    size=st.integers(1, 5),
    per_cell=st.integers(1, 3),
    data=st.data(),
)
def test_chunks_are_the_frames_that_a_plain_decoder_gives(name, num_frames, chunk, size, per_cell, data):
    shard = FrameShard(data.draw(st.integers(0, size - 1)), size)
    sampling = VideoSampling(fps=None, num_frames=num_frames, min_frames=1)
    reader = VideoReader(clip(name), sampling, shard, per_cell)
    parts = list(reader.chunks(chunk))
    assert all(len(part.pixels) == chunk for part in parts[:-1])
    assert {(part.key, part.timestamps) for part in parts} <= {(reader.outline.key, reader.outline.timestamps)}
    found = torch.cat([reader.outline.pixels, *(part.pixels for part in parts)])
    assert torch.equal(found, pictures(name)[reader.indices])
    assert len(found) == len(shard.frames(len(reader.outline.timestamps), per_cell))


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("seek_frames", [0, 10**9])
def test_seeking_and_going_on_give_the_same(name, seek_frames, monkeypatch):
    monkeypatch.setattr(pyav_frames, "SEEK_FRAMES", seek_frames)
    for count in (2, 9):
        reader = VideoReader(clip(name), VideoSampling(fps=None, num_frames=count, min_frames=1))
        assert torch.equal(next(reader.chunks(100)).pixels, pictures(name)[reader.indices])


class LateSeeks:
    """A container whose seeks end three frames late, unless they go to the beginning; every frame is a packet."""

    def __init__(self):
        self.start, self.seeks = 0, 0

    def seek(self, pts, stream):
        self.start, self.seeks = pts + 3 if pts else 0, self.seeks + 1

    def demux(self, stream):
        for pts in range(self.start, 100):
            frame = types.SimpleNamespace(pts=pts, is_corrupt=False)
            yield types.SimpleNamespace(
                pts=pts, is_keyframe=pts % 20 == 0, is_corrupt=False, decode=lambda frame=frame: [frame]
            )


def test_a_seek_that_ends_behind_the_frame_is_made_good():
    numbers = np.arange(100)
    container = LateSeeks()
    index = FrameIndex(numbers, numbers.astype(float), 100.0, np.array([0, 20, 40, 60, 80]), (2, 2))
    position = FramePosition(container, None, index, DecodeClock("x.mp4", MediaLimits()))
    assert [position.advance_to(number).pts for number in (1, 41, 50, 64)] == [1, 41, 50, 64]
    assert container.seeks == 2  # 41 needs a second one, to the beginning; from then on nothing is left out
    index.pts[70] = 1000
    assert position.advance_to(70) is None


def test_an_open_gop_that_needs_what_is_before_it_is_decoded_in_turn(monkeypatch):
    monkeypatch.setattr(pyav_frames, "SEEK_FRAMES", 0)
    seeks = []
    real = FramePosition._jump
    monkeypatch.setattr(FramePosition, "_jump", lambda position, *at: seeks.append(at[0]) or real(position, *at))
    reader = VideoReader(clip("open_gops.mp4"), VideoSampling(fps=None, num_frames=10))
    assert torch.equal(next(reader.chunks(100)).pixels, pictures("open_gops.mp4")[reader.indices])
    assert seeks.count(0) <= 1


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8), num_frames=st.integers(1, 12))
def test_regrouped_parts_are_the_same_frames(sizes, num_frames):
    outline = VideoReader(clip("plain.mp4"), ALL).outline
    pixels = torch.arange(3 * sum(sizes)).view(-1, 3, 1, 1)
    parts = [dataclasses.replace(outline, pixels=part) for part in pixels.split(sizes)]
    found = [part.pixels for part in regroup_frames(iter(parts), num_frames)]
    assert [len(part) for part in found[:-1]] == [num_frames] * (len(found) - 1)
    assert torch.equal(torch.cat([pixels[:0], *found]), pixels)


def test_what_is_larger_than_allowed_is_drawn_to_its_end_and_let_go():
    reader = VideoReader(clip("plain.mp4"), ALL)
    parts = reader.chunks(8)
    assert hold_frames(parts, len(reader.indices), max_mib=0) is None
    assert next(parts, None) is None
    whole = hold_frames(reader.chunks(8), len(reader.indices), max_mib=1)
    assert torch.equal(whole.pixels, read_video(clip("plain.mp4"), ALL).pixels)


# ---- families ----

FAMILIES = {
    "qwen2_5": lambda **options: vl_family(freeze_vision_encoder=True, max_video_pixels=45 * 32 * 32, **options),
    "qwen3": lambda **options: qwen3_vl_family(freeze_vision_encoder=True, **options),
    "vila": lambda **options: vila_family(freeze_vision_encoder=True, **options),
    "internvl": lambda **options: internvl_family(freeze_vision_encoder=True, freeze_projector=True, **options),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_a_family_resizes_a_chunk_as_it_resizes_the_whole(make):
    family = make()
    for name, count in (("b_frames.mp4", 13), ("plain.mp4", 45)):
        whole = read_video(clip(name), VideoSampling(fps=None, num_frames=count))
        wanted = family.patch(whole)
        for size in (1, 3, count):
            parts = whole.pixels.split(size * wanted.temporal_patch_size)
            resized = [family.resize(dataclasses.replace(whole, pixels=part)) for part in parts]
            made = [family.patch(part) for part in resized]
            assert all(part.resized for part in resized)
            assert {(part.key, part.grid_thw) for part in made} == {(wanted.key, wanted.grid_thw)}
            assert torch.equal(torch.cat([part.patches for part in made]), wanted.patches)


def rendered(family: CausalFamily, path, shard=FULL_SHARD, **decoding):
    """A prompt about a video, and its one medium."""
    sampling = VideoSampling(fps=None, num_frames=21)
    renderer = RowRenderer(family, sampling, decoding=DecodeLimits(**decoding), shard=shard)
    prompt = renderer(row("a", videos=(str(path),)))
    return prompt, prompt.media[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_are_the_same_wherever_the_frames_wait_and_however_they_are_cut(name):
    """Patched by the loader, held, or decoded while the encoder encodes."""
    whole, few = FAMILIES[name](), FAMILIES[name]()
    few.max_patches_per_encode = few.max_frames_per_encode = few.max_tiles_per_encode = 1  # a cell at a time
    model = whole.build()
    prompt, patched = rendered(whole, clip("b_frames.mp4"))
    assert patched.source is None
    (wanted,) = FeatureCache(whole).get_or_encode(model, [prompt]).values()
    found = []
    for chunk, max_mib, source in itertools.product((1, 4, 50), (0, 9), (None, few)):
        family = source or whole
        other, medium = rendered(family, clip("b_frames.mp4"), chunk_frames=chunk, max_held_mib=max_mib)
        held = source is not None and max_mib > 0
        assert isinstance(medium.source, HeldFrames if held else FileFrames) or (not source and max_mib)
        assert medium.key == patched.key
        assert torch.equal(other.input_ids, prompt.input_ids)
        (features,) = FeatureCache(family).get_or_encode(model, [other]).values()
        torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-6)
        found.append((family is whole, features))
    for is_whole in (True, False):  # the same calls of the encoder: the same to the last bit
        first, *others = (features for same, features in found if same is is_whole)
        assert all(torch.equal(first, other) for other in others)
    assert torch.equal(next(features for is_whole, features in found if is_whole), wanted)


@pytest.mark.parametrize("max_mib", [0, 9])
def test_a_tower_that_trains_reads_streamed_frames_too(max_mib):
    from longrl.features.trainable_features import TrainableFeatures

    family = vl_family(freeze_vision_encoder=False)
    model = family.build()
    prompt, _ = rendered(family, clip("plain.mp4"))
    (wanted,) = TrainableFeatures(family, model, [prompt]).leaves.values()
    family.max_patches_per_encode = 1 if max_mib else family.max_patches_per_encode
    prompt, medium = rendered(family, clip("plain.mp4"), max_held_mib=max_mib)
    assert medium.source
    (found,) = TrainableFeatures(family, model, [prompt]).leaves.values()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_mib", [0, 9])
@pytest.mark.parametrize("size", [2, 3, 40])
def test_ranks_that_share_a_video_have_its_patches_between_them(max_mib, size):
    from longrl.features.cache import patched_parts

    family = vl_family(freeze_vision_encoder=True)
    _, whole = rendered(family, clip("b_frames.mp4"))
    family.max_patches_per_encode = 2 * whole.grid_thw[1] * whole.grid_thw[2]
    found = []
    for rank in range(size):
        _, medium = rendered(family, clip("b_frames.mp4"), FrameShard(rank, size), max_held_mib=max_mib, chunk_frames=3)
        cells = len(FrameShard(rank, size).temporal_patches(medium.grid_thw[0]))
        part = medium.part(cells)
        parts = [part] if medium.source is None else list(patched_parts(family, part))
        parts = parts if cells else []
        assert medium.key == whole.key
        assert sum(part.grid_thw[0] for part in parts) == cells
        found += [part.patches for part in parts]
    assert torch.equal(torch.cat(found), whole.patches)


def streamed_by_a_team(path, max_mib):
    """Features of a video that the ranks of a team share."""
    sp_group = Axis.of(None)
    family = vl_family(freeze_vision_encoder=True, max_patches_per_encode=1)
    prompt, medium = rendered(family, path, FrameShard(sp_group.rank, sp_group.size), max_held_mib=max_mib)
    assert medium.source
    cache = FeatureCache(family, parallel=Parallel(world=sp_group, sp_group=sp_group))
    return next(iter(cache.get_or_encode(family.build(), [prompt]).values())).clone()


@pytest.mark.slow
def test_two_ranks_that_stream_a_video_have_the_features_of_one(tmp_path):
    path = write(tmp_path / "v.mp4", 60, bf="3", g="12", noise=True)
    family = vl_family(freeze_vision_encoder=True, max_patches_per_encode=1)
    prompt, _ = rendered(family, path, max_held_mib=0)
    (wanted,) = FeatureCache(family).get_or_encode(family.build(), [prompt]).values()
    for max_mib in (0, 9):
        for found in run_distributed(streamed_by_a_team, 2, path, max_mib):
            assert torch.equal(found, wanted)


def test_held_frames_travel_from_workers_in_shared_memory():
    from longrl.datamodules.loading.loader import LoaderOptions, RenderedRows
    from longrl.datamodules.loading.workers import IPCPayload

    path = clip("b_frames.mp4")
    family = vl_family(
        freeze_vision_encoder=True, max_patches_per_encode=16, max_pixels=448 * 448, min_pixels=448 * 448
    )
    renderer = RowRenderer(family, VideoSampling(fps=None, num_frames=21))
    here = renderer(row("a", videos=(str(path),)))
    parcel = IPCPayload.pack(here)
    assert [len(tensor) for tensor in parcel.shared] == [21]
    assert len(parcel.pickled) < 120_000
    rows = RenderedRows([here.row], renderer)
    (there,) = LoaderOptions(num_workers=1).render(rows, [0])
    (one,), (other,) = (list(prompt.media[0].source()) for prompt in (here, there))
    assert torch.equal(one.pixels, other.pixels)


# ---- what breaks ----


def with_a_hole(tmp_path, count=60):
    """A video of which the first half is fine."""
    path = write(tmp_path / "hole.mp4", count, noise=True, movflags="faststart", g="5")
    content = bytearray(path.read_bytes())
    content[len(content) * 5 // 8 : len(content) * 6 // 8] = bytes(len(content) * 6 // 8 - len(content) * 5 // 8)
    path.write_bytes(content)
    return path


def test_a_chunk_before_the_damage_is_given_and_then_the_error(tmp_path):
    chunks = VideoReader(with_a_hole(tmp_path), ALL).chunks(10)
    assert shown(next(chunks))
    with pytest.raises(UnusableSample, match="cannot be decoded"):
        list(chunks)


@pytest.mark.parametrize("decoding", [{}, {"max_held_mib": 0}])
@pytest.mark.parametrize("max_patches", [1, 1 << 16])
def test_the_loader_finds_a_frame_that_breaks_wherever_frames_wait(tmp_path, decoding, max_patches):
    family = vl_family(max_patches_per_encode=max_patches)
    with pytest.raises(UnusableSample, match="hole.mp4: it cannot be decoded"):
        rendered(family, with_a_hole(tmp_path), **decoding)


def test_a_streamed_video_that_breaks_is_skipped_and_listed(tmp_path):
    record = {"problem": "What?", "answer": "x", "task": "exact", "videos": str(clip("plain.mp4"))}
    records = [dict(record) for _ in range(40)]
    records[3]["videos"] = str(with_a_hole(tmp_path))
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = LongVideoReason(
        vl_family(), train=str(source), video=VideoSampling(fps=None, num_frames=20), max_held_mib=0,
        decode_chunk_frames=4, prompts_per_batch=1, skipped_dir=str(tmp_path), allow_outside_paths=True,
    )  # fmt: skip
    data.setup("fit")
    assert len(data.draw_prompts(39)) == 39
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("hole.mp4")


def test_a_large_video_is_looked_through_once(monkeypatch):
    decoded = []
    real = VideoReader.chunks
    monkeypatch.setattr(VideoReader, "chunks", lambda reader, count: decoded.append(count) or real(reader, count))
    renderer = RowRenderer(vl_family(), VideoSampling(), decoding=DecodeLimits(max_held_mib=0))
    for _ in range(3):
        assert renderer(row("a", videos=(str(clip("plain.mp4")),))).media[0].source
    assert decoded == [32]


def test_a_file_that_changes_before_it_is_encoded_is_an_error(tmp_path):
    family = vl_family(freeze_vision_encoder=True)
    path = write(tmp_path / "v.mp4", 40)
    prompt, medium = rendered(family, path, max_held_mib=0)
    assert medium.source
    write(path, 41)
    with pytest.raises(ValueError, match="changed while it was in use"):
        FeatureCache(family).get_or_encode(family.build(), [prompt])
    path.unlink()
    with pytest.raises(UnusableSample, match="does not exist"):
        FeatureCache(family).get_or_encode(family.build(), [prompt])


@pytest.mark.parametrize(("option", "value"), [("decode_chunk_frames", 0), ("max_held_mib", -1)])
def test_an_impossible_option_is_refused(option, value):
    with pytest.raises(ValueError, match=rf"data\.{option} must be at least {max(value + 1, 0)}, got {value}"):
        LongVideoReason(vl_family(), **{option: value})


# ---- memory ----


def peak_mib():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def growth_mib(path):
    """What encoding a whole file frame by frame adds to the memory of this process."""
    torch.set_num_threads(1)
    family = vl_family(freeze_vision_encoder=True, max_patches_per_encode=16 * 64)
    model = family.build()
    sampling = VideoSampling(fps=None, num_frames=100_000, max_frames=100_000)
    renderer = RowRenderer(family, sampling, decoding=DecodeLimits(max_held_mib=0, chunk_frames=16))
    small = renderer(row("a", videos=(str(clip("plain.mp4")),)))
    FeatureCache(family).get_or_encode(model, [small])
    before = peak_mib()
    prompt = renderer(row("a", videos=(str(path),)))
    (features,) = FeatureCache(family).get_or_encode(model, [prompt]).values()
    return peak_mib() - before, len(features)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
def test_memory_does_not_grow_with_the_length_of_a_video(tmp_path):
    """1,600 frames of 320 x 240 are 352 MiB as RGB."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for count in (400, 1600):
        path = write(tmp_path / f"{count}.mp4", count, size=(320, 240), preset="ultrafast", g="50")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found[count], rows = pool.submit(growth_mib, path).result()
        assert rows == count
    assert found[1600] < found[400] + 60
    assert found[1600] < 200
