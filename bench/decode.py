"""Decoding an hour of video at one frame per second: seconds, and the most memory a process holds.

The video is longrl's own synthetic kind, 3,600 s at 5 fps, H.264 with a key frame every 64 frames. Each method decodes
the same 3,600 frames in a process of its own, on one thread, as loader workers do:

- decord: `get_batch` of all indices, the whole video at full size.
- decord, chunks: `get_batch` of 32 indices at a time, each chunk dropped at once.
- decord + resize: all indices at once, then resized by Qwen2.5-VL's own video processor; what longrl did before.
- pyav: all 18,000 frames of the file decoded in turn, those wanted turned to RGB and dropped at once.
- longrl: `VideoReader.chunks(32)`, each chunk dropped at once.
- longrl + resize: the same, each chunk resized by the family before the next one is decoded.
- longrl, decord and longrl, torchcodec: as longrl, with that `data.video.decoder`. torchcodec is left out where it
  or FFmpeg's shared libraries are missing (docs/media.md).

Before it is timed, every decoder's frames are compared with PyAV's, bit for bit. `decoder` is whose pixels these are,
`peak_mib` is of the whole process, `imports_mib` what it held before the file was opened. `seconds` and `cpu_s`, the
processor's time, which a busy machine changes less, are medians.

    python bench/decode.py --json bench/results/decode.json
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

import torch
from common import Row, in_fresh_process, parse_arguments, peak_memory_mib, report

from longrl.datamodules.media.decoders import decoder_version
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.video import VideoReader
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.testing.drawing import Clip, write_video
from longrl.testing.stories import sample_story
from longrl.testing.synthetic_videos import SyntheticConfig
from longrl.testing.tiny import tiny_qwen2_5_vl


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    seconds: int = 3600
    fps: int = 5
    size: int = 384
    max_pixels: int = 128 * 28 * 28
    chunk_frames: int = 32
    repeats: int = 3


FULL = Sizes()
QUICK = Sizes(seconds=300, repeats=1)
NUM_SCENES = 6
Decoder = Literal["pyav", "decord", "torchcodec"]
DECODERS: tuple[Decoder, ...] = ("decord", "torchcodec", "pyav")
EVERY_SECOND = VideoSampling(fps=1.0, max_frames=1 << 20)


def make_video(path: Path, sizes: Sizes) -> None:
    """A story of six long scenes, drawn and encoded frame by frame."""
    config = SyntheticConfig(scene_s=sizes.seconds / NUM_SCENES, fps=sizes.fps, size=sizes.size)
    write_video(path, Clip(path.name, sample_story(Random(0), num_scenes=NUM_SCENES), "0"), config)


def with_decord(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """Frames decoded, all in memory."""
    return len(_get_batch(known))


def with_decord_in_chunks(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """Frames decoded, a chunk in memory besides what decord keeps."""
    import decord

    reader, count = decord.VideoReader(str(known.path), num_threads=1), 0
    for start in range(0, len(known.indices), sizes.chunk_frames):
        count += len(reader.get_batch(known.indices[start : start + sizes.chunk_frames]).asnumpy())
    return count


def with_decord_and_resize(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """Frames decoded and resized, all in memory."""
    frames = dataclasses.replace(known.outline, pixels=_get_batch(known))
    return len(family.resize(frames).pixels)


def _get_batch(known: VideoReader) -> torch.Tensor:
    import decord

    reader = decord.VideoReader(str(known.path), num_threads=1)
    return torch.from_numpy(reader.get_batch(known.indices).asnumpy()).permute(0, 3, 1, 2)


def with_pyav(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """Frames decoded, one in memory."""
    import av

    wanted, count = set(known.indices), 0
    with av.open(str(known.path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frame.to_ndarray(format="rgb24")
                count += 1
    return count


def with_longrl(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """Frames decoded, a chunk in memory."""
    return _count(known, "pyav", sizes)


def with_longrl_decord(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """The same by decord, which keeps more than a chunk."""
    return _count(known, "decord", sizes)


def with_longrl_torchcodec(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """The same by torchcodec."""
    return _count(known, "torchcodec", sizes)


def _count(known: VideoReader, decoder: Decoder, sizes: Sizes) -> int:
    sampling = dataclasses.replace(EVERY_SECOND, decoder=decoder)
    return sum(len(frames.pixels) for frames in VideoReader(known.path, sampling).chunks(sizes.chunk_frames))


def with_longrl_and_resize(known: VideoReader, family: Qwen2_5_VLFamily, sizes: Sizes) -> int:
    """Frames decoded and resized, a chunk in memory."""
    chunks = VideoReader(known.path, EVERY_SECOND).chunks(sizes.chunk_frames)
    return sum(len(frames.pixels) for frames in map(family.resize, chunks))


METHODS: dict[str, Callable[[VideoReader, Qwen2_5_VLFamily, Sizes], int]] = {
    "decord": with_decord,
    "decord, chunks": with_decord_in_chunks,
    "decord + resize": with_decord_and_resize,
    "pyav": with_pyav,
    "longrl": with_longrl,
    "longrl + resize": with_longrl_and_resize,
    "longrl, decord": with_longrl_decord,
    "longrl, torchcodec": with_longrl_torchcodec,
}


@dataclass(frozen=True)
class Measured:
    """One pass."""

    frames: int
    seconds: float
    cpu_s: float
    peak_mib: float
    imports_mib: float


def measure(method: str, path: Path, folder: Path, sizes: Sizes) -> Measured:
    """One pass in this process, which must be fresh."""
    for decoder in DECODERS:  # in memory whatever the method
        is_installed(decoder)
    torch.set_num_threads(1)
    family = Qwen2_5_VLFamily(str(folder), max_pixels=sizes.max_pixels)
    assert family.processor  # loaded before the clock starts
    known = VideoReader(path, EVERY_SECOND)  # decord and pyav are told which frames to read
    imports_mib = peak_memory_mib()
    start, cpu_start = time.perf_counter(), time.process_time()
    count = METHODS[method](known, family, sizes)
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
    return Measured(count, seconds, cpu_s, peak_memory_mib(), imports_mib)


def summary(method: str, passes: Sequence[Measured]) -> Row:
    """A row of the table."""
    (frames,) = {item.frames for item in passes}
    return {
        "method": method,
        "decoder": decoder_of(method),
        "frames": frames,
        "seconds": statistics.median(item.seconds for item in passes),
        "cpu_s": statistics.median(item.cpu_s for item in passes),
        "peak_mib": max(item.peak_mib for item in passes),
        "imports_mib": max(item.imports_mib for item in passes),
    }


def decoder_of(method: str) -> Decoder:
    """Whose pixels a method gives."""
    return next((decoder for decoder in DECODERS if decoder in method), "pyav")


def is_installed(decoder: Decoder) -> bool:
    """True if the decoder and what it needs are here."""
    try:
        decoder_version(VideoSampling(decoder=decoder))
    except ImportError:
        return False
    return True


def compare(path: Path, decoder: Decoder) -> None:
    """Some frames of a decoder with PyAV's.

    Raises:
        ValueError: they differ.
    """
    some = VideoSampling(fps=None, num_frames=20, min_frames=1)
    readers = [VideoReader(path, dataclasses.replace(some, decoder=one)) for one in ("pyav", decoder)]
    for expected, found in zip(*(reader.chunks(5) for reader in readers), strict=True):
        if not torch.equal(expected.pixels, found.pixels):
            raise ValueError(f"{decoder} gives other pixels than PyAV; its times say nothing")


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    there = [decoder for decoder in DECODERS if is_installed(decoder)]
    methods = [method for method in METHODS if decoder_of(method) in there]
    passes: dict[str, list[Measured]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hour.mp4"
        make_video(path, sizes)
        for decoder in there:
            compare(path, decoder)
        tiny_qwen2_5_vl(Path(folder) / "model")
        for _, method in itertools.product(range(sizes.repeats), methods):
            passes[method].append(in_fresh_process(measure, method, path, Path(folder) / "model", sizes))
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(sizes).items())
    rows = [summary(method, items) for method, items in passes.items()]
    versions = ", ".join(decoder_version(VideoSampling(decoder=decoder)) for decoder in there)
    report(__file__, arguments, rows, notes=[f"sizes: {settings}", f"decoders: {versions}"])


if __name__ == "__main__":
    main()
