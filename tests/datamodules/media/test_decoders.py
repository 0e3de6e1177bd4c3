"""decord and torchcodec give PyAV's frames, bit for bit, or say that they cannot; a wrong frame is never given.

decord 0.6.0 and torchcodec 0.13.0 are compared as they are installed; PyAV's frames are compared with a plain loop
over `container.decode` in test_video_parts.py. What a GPU would do is asked of a stand-in.
"""

import dataclasses
import functools
import sys
import tempfile
import types
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longrl.datamodules.loading.render import RowRenderer
from longrl.datamodules.media import decoders, device_frames
from longrl.datamodules.media.decoders import DecordFrames, TorchcodecFrames, check_decoder, decoder_version
from longrl.datamodules.media.ffmpeg_links import link_ffmpeg
from longrl.datamodules.media.opening import MediaLimits
from longrl.datamodules.media.orientation import Orientation
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, FileFrames, open_video, read_video
from longrl.datamodules.media.video import VideoReader, read_frame_index
from longrl.environments.video_tools import VideoTools
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.features.cache import encoder_device, patched_parts
from longrl.types import Row, UnusableSample
from tests.datamodules.media.test_video import ALL, display_matrix, write
from tests.tiny import vl_family

HALF_TURN = (-1, 0, 0, -1)
UNEVEN_MS = [0, 1000, 2000, 3000, *range(4000, 5500, 90)]
X265 = {"codec": "libx265", "g": "12"}
CLOSED = "log-level=none:bframes=3:b-adapt=0:open-gop=0:keyint=12"
OPEN = {"count": 60, "bf": "3", "g": "15", "flags": "-cgop", "x264_params": "open-gop=1:b-adapt=0"}
B_FRAMES = {"count": 40, "bf": "3", "g": "12", "x264_params": "b-adapt=0"}
EQUAL = {
    "h264_b_frames.mp4": B_FRAMES,
    "h264_b_frames.mkv": B_FRAMES,
    "h265_b_frames.mp4": {**X265, "count": 40, "x265_params": CLOSED},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "uneven.mp4": {"count": len(UNEVEN_MS), "times_ms": UNEVEN_MS, "g": "10"},
    "uneven.mkv": {"count": len(UNEVEN_MS), "times_ms": UNEVEN_MS, "g": "10", "bf": "2"},
    "quarter_turn.mp4": {"matrix": (0, 1, -1, 0), "size": (66, 50)},
    "half_turn.mp4": {"matrix": HALF_TURN},
    "square_turned.mp4": {"matrix": (0, -1, 1, 0), "size": (64, 64)},
    "odd_444.mp4": {"size": (113, 87), "pix_fmt": "yuv444p"},
    "full_range.mp4": {"pix_fmt": "yuvj420p", "size": (66, 50)},
    "bt709.mp4": {"x264_params": "colormatrix=bt709", "size": (66, 50)},
    "mpeg4.avi": {"codec": "mpeg4"},
}
"""Files that all three decode to the same bits."""
TORCHCODEC_ALONE = {
    "av1.mp4": {"codec": "libsvtav1"},
    "open_gops.mp4": OPEN,
    "h265.mp4": {**X265, "count": 60, "x265_params": "log-level=none"},
}
"""decord has no AV1, and loses count in open GOPs, which are x265's default."""
REFUSED = {
    "recording.ts": ("recording of a broadcast", {"count": 60, "bf": "2", "g": "12", "rate": 25}),
    "timeless.avi": ("frames have no times", B_FRAMES),
    "mirrored.mp4": ("picture is mirrored", {"matrix": (-1, 0, 0, 1)}),
    "askew.mp4": ("a little more or less than a right angle", {"matrix": (0.0001, 1, -1, 0)}),
    "10_bits.mp4": ("its pixels are yuv420p10le, of which it makes other colours", {"pix_fmt": "yuv420p10le"}),
    "alpha.mov": ("transparent pixels", {"codec": "prores_ks", "pix_fmt": "yuva444p10le", "count": 4}),
    "flash.flv": ("does not begin as MP4", B_FRAMES),
}
"""Files that neither reads for sure, and why."""
FEW = VideoSampling(fps=None, num_frames=9)


@functools.cache
def clip(name):
    path = Path(tempfile.mkdtemp(prefix="longrl-clip-")) / name
    if name == "half_turn.mkv":
        return copy_packets(clip("half_turn.mp4"), path, HALF_TURN)
    kinds = {**EQUAL, **TORCHCODEC_ALONE, **{name: kind for name, (_, kind) in REFUSED.items()}}
    kind = {"count": 24, "draw": moving, **kinds[name]}
    return write(path, kind.pop("count"), **kind)


def copy_packets(source, path, matrix):
    """The same in another container: encoded again it may have other bits, rarely, on a busy machine."""
    with av.open(str(source)) as given, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        stream.set_display_matrix(display_matrix(*matrix))
        for packet in given.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return path


def moving(index, width, height):
    """A picture without symmetry, with fine structure, that moves: encoders make B-frames of such."""
    x, y = np.arange(width)[None, :] + index, np.arange(height)[:, None]
    waves = [np.sin(0.11 * x + 0.05 * y), np.cos(0.07 * y - 0.03 * x), np.sin(0.004 * x * y)]
    grain = np.random.default_rng(0).normal(scale=8, size=(height, width, 3))
    return (128 + 100 * np.stack(waves, -1) + grain).clip(0, 255).astype(np.uint8)


def installed(decoder):
    """The option, where what it needs is here."""
    try:
        decoder_version(VideoSampling(decoder=decoder))
    except ImportError as error:
        pytest.skip(str(error))
    return decoder


both = pytest.mark.parametrize("decoder", ["decord", "torchcodec"])


# ------------------------------------------------------------------------------------------------------------- equality


def equal(name, decoder):
    for sampling in (ALL, FEW):  # in turn, and from key frame to key frame
        expected = read_video(clip(name), sampling)
        assert not torch.equal(expected.pixels[0], expected.pixels[0].flip(-1))
        reader = open_video(clip(name), dataclasses.replace(sampling, decoder=decoder))
        parts = list(reader.chunks(4))
        found = parts[0]
        assert (found.timestamps, found.indices, found.duration_s) == (
            expected.timestamps,
            expected.indices,
            expected.duration_s,
        )
        assert found.key != expected.key
        assert torch.equal(torch.cat([part.pixels for part in parts]), expected.pixels)


def test_the_files_have_b_frames_and_open_gops():
    """Otherwise decoders would agree on less than they seem to."""
    for name, leads in (("h264_b_frames.mp4", False), ("h265_b_frames.mp4", False), ("open_gops.mp4", True)):
        with av.open(str(clip(name))) as container:
            packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
        times = [time for time, _ in packets]
        assert times != sorted(times)
        keys = [number for number, (_, is_key) in enumerate(packets) if is_key]
        assert len(keys) > 2
        assert any(times[key + 1] < times[key] for key in keys[:-1]) == leads


@both
@pytest.mark.parametrize("name", EQUAL)
def test_pixels_and_times_are_those_of_pyav(name, decoder):
    equal(name, installed(decoder))


@pytest.mark.parametrize("name", TORCHCODEC_ALONE)
def test_what_decord_cannot_do_is_refused_with_a_remedy(name):
    reader = open_video(clip(name), VideoSampling(fps=None, num_frames=9, decoder=installed("decord")))
    with pytest.raises(UnusableSample, match=r"decord can.*pyav can") as refusal:
        list(reader.chunks(4))
    assert "github" not in refusal.value.reason


@pytest.mark.parametrize("name", TORCHCODEC_ALONE)
def test_torchcodec_reads_av1_and_open_gops(name):
    equal(name, installed("torchcodec"))


@both
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_only_pyav_reads_for_sure_is_refused_unopened(name, decoder, monkeypatch):
    installed(decoder)
    for kind in ("DecordFrames", "TorchcodecFrames"):
        monkeypatch.setattr(f"longrl.datamodules.media.video.{kind}", lambda *_: pytest.fail("it was opened"))
    assert len(read_video(clip(name), FEW).pixels)
    reader = open_video(clip(name), dataclasses.replace(FEW, decoder=decoder))
    with pytest.raises(UnusableSample, match=rf"{decoder} cannot be trusted.*{REFUSED[name][0]}.*decoder=pyav"):
        list(reader.chunks(4))


@both
def test_half_a_turn_that_is_not_made_is_noticed(decoder, monkeypatch):
    """decord obeys the matrix of MP4 and MOV alone, and neither obeys one in the stream, which only frames tell."""
    turned, path = clip("half_turn.mkv"), clip("bt709.mp4")
    assert torch.equal(read_video(turned, FEW).pixels, read_video(clip("half_turn.mp4"), FEW).pixels)
    if installed(decoder) == "torchcodec":
        equal(turned.name, decoder)
    refused = [turned, path] if decoder == "decord" else [path]
    by_frames = dataclasses.replace(read_frame_index(path), orientation=Orientation(mirrored_x=True, mirrored_y=True))
    monkeypatch.setattr("longrl.datamodules.media.video.known_index", lambda *_: by_frames)
    for file in refused:
        reader = open_video(file, dataclasses.replace(FEW, decoder=decoder))
        with pytest.raises(UnusableSample, match=r"does not turn its picture.*decoder=pyav"):
            reader.try_ends()


@both
def test_a_torn_file_is_left_to_pyav(decoder, tmp_path):
    content = write(tmp_path / "v.mp4", 60, movflags="faststart", noise=True).read_bytes()
    (tmp_path / "torn.mp4").write_bytes(content[: len(content) // 2])
    reader = open_video(tmp_path / "torn.mp4", dataclasses.replace(FEW, torn="keep", decoder=installed(decoder)))
    with pytest.raises(UnusableSample, match="it was cut off"):
        list(reader.chunks(4))


@both
def test_other_times_or_frames_than_the_index_has_are_noticed(decoder):
    path, kind = clip("h264_b_frames.mp4"), {"decord": DecordFrames, "torchcodec": TorchcodecFrames}[installed(decoder)]
    index = read_frame_index(path)
    late = dataclasses.replace(index, starts=index.starts * 1.1)
    with pytest.raises(UnusableSample, match="other times|other frames"):
        kind(path, late, MediaLimits()).pixels([3])
    with pytest.raises(UnusableSample, match="it finds 40 frames, PyAV 39"):
        kind(path, index.first_frames(39), MediaLimits())


@both
def test_decoding_ends_at_its_limit(decoder):
    path, kind = clip("h264_b_frames.mp4"), {"decord": DecordFrames, "torchcodec": TorchcodecFrames}[installed(decoder)]
    with pytest.raises(UnusableSample, match="max_decode_s"):
        kind(path, read_frame_index(path), MediaLimits(max_decode_s=1e-9)).pixels([3])


# -------------------------------------------------------------------------------------------------------------- options


def test_keys_and_stored_answers_name_the_decoder():
    family = vl_family()
    plain = RowRenderer(family, VideoSampling()).identity()
    assert plain["decoder"] == f"PyAV {av.__version__}"
    for decoder in ("decord", "torchcodec"):
        other = RowRenderer(family, VideoSampling(decoder=installed(decoder))).identity()
        assert other["decoder"].startswith(f"{decoder} 0.")
        assert other["video"]["decoder"] == decoder
        assert "decode_on" not in other["video"]


@both
def test_a_missing_package_is_an_error_before_the_run(decoder, monkeypatch):
    monkeypatch.setitem(sys.modules, decoder, None)
    for load in (decoders._decord, decoders._torchcodec):
        load.cache_clear()
    renderer = RowRenderer(vl_family(), VideoSampling(decoder=decoder))
    with pytest.raises(ImportError, match=rf"data\.video\.decoder={decoder} needs.*pip install 'longrl\[{decoder}\]'"):
        renderer.try_options([])


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="decoder must be pyav or decord or torchcodec, got 'opencv'"):
        VideoSampling(decoder="opencv")
    with pytest.raises(ValueError, match="decode_on=encoder needs decoder=torchcodec"):
        VideoSampling(decode_on="encoder")


def test_tools_show_what_their_decoder_gives():
    tools = VideoTools(decoder=installed("decord"))
    tools.reset(Row("1", "", "A", videos=(str(clip("vp9.webm")),)))
    shown = tools.get_frames([1.0])
    (frames,) = (part for part in shown.content if not isinstance(part, str))
    assert frames.source.sampling.decoder == "decord"
    assert torch.equal(next(frames.source()).pixels, read_video(clip("vp9.webm"), VideoSampling(at_s=(1.0,))).pixels)


@pytest.mark.skipif(sys.platform != "linux", reason="the names are those of Linux")
def test_links_lead_to_the_libraries_of_pyav(tmp_path):
    folder = link_ffmpeg(link_ffmpeg(tmp_path / "ffmpeg"))  # again, as after an update
    major = av.library_versions["libavcodec"][0]
    assert "av.libs" in str((folder / f"libavcodec.so.{major}").resolve(strict=True))


# ------------------------------------------------------------------------------------------------- the encoder's device


to = torch.Tensor.to
ON_ENCODER = VideoSampling(fps=None, num_frames=9, decoder="torchcodec", decode_on="encoder")


class Calls(list):
    """What was asked for, and which frames the GPU does not decode."""

    broken = frozenset()
    error = RuntimeError("cuvidDecodePicture failed: 1")


@pytest.fixture
def gpu(monkeypatch):
    """Calls of a torchcodec whose pixels on a GPU are on the meta device, where a copy to the host is an error."""
    calls = Calls()

    class VideoDecoder:
        cpu_fallback = False

        def __init__(self, path, *, num_ffmpeg_threads, device):
            self.frames, self.device = read_video(path, ALL), torch.device(device)
            calls.append(device)

        def __len__(self):
            return len(self.frames.timestamps)

        def get_frames_at(self, indices):
            calls.append(list(indices))
            if self.device.type == "cuda" and calls.broken.intersection(indices):
                raise calls.error
            pixels = self.frames.pixels[indices]
            if self.device.type == "cuda":
                pixels = pixels.to("meta")
            times = torch.tensor(self.frames.timestamps, dtype=torch.float64)[indices]
            return types.SimpleNamespace(data=pixels, pts_seconds=times)

    module = types.ModuleType("torchcodec")
    module.__version__, module.ffmpeg_major_version = "0.99.0+cu130", 8
    module.decoders = types.ModuleType("torchcodec.decoders")
    module.decoders.VideoDecoder = VideoDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", module)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module.decoders)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    decoders._torchcodec.cache_clear()
    yield calls
    decoders._torchcodec.cache_clear()


def test_the_loader_decodes_two_frames_and_the_encoder_all_of_them_on_its_device(gpu):
    family, path = vl_family(), clip("vp9.webm")
    renderer = RowRenderer(family, ON_ENCODER, decoding=DecodeLimits(chunk_frames=4))
    renderer.try_options([])
    (item,) = renderer(Row("1", "<video>\nWhat?", "A", videos=(str(path),))).media
    indices = item.source._reader().indices
    assert gpu == ["cpu", [indices[0], indices[-1]]]

    gpu.clear()
    parts = list(patched_parts(family, item, torch.device("cuda:1")))
    assert gpu == ["cuda:1", indices[:4], indices[4:8], indices[8:]]
    assert all(part.patches.device.type == "meta" for part in parts)
    expected = family.patch(read_video(path, FEW))
    assert sum(len(part.patches) for part in parts) == len(expected.patches)
    assert item.grid_thw == expected.grid_thw

    # Pictures for people are decoded on the CPU, and features have a key of their own.
    assert all(part.pixels.device.type == "cpu" for part in item.source())
    on_cpu = dataclasses.replace(ON_ENCODER, decode_on="cpu")
    assert VideoReader(path, on_cpu).outline.key != VideoReader(path, ON_ENCODER).outline.key


def test_what_the_device_cannot_decode_is_decoded_on_the_cpu_and_counted(gpu, monkeypatch, caplog):
    counted = device_frames.Fallbacks()
    monkeypatch.setattr(device_frames, "FALLBACKS", counted)
    copied = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: copied.append(device) or to(tensor, "meta"))
    reader, device = open_video(clip("vp9.webm"), ON_ENCODER), torch.device("cuda:1")
    first, second, third = reader.indices[:4], reader.indices[4:8], reader.indices[8:]
    gpu.broken = {second[1]}
    chunks = list(reader.chunks(4, device))
    assert gpu == ["cuda:1", first, second, "cpu", second, third]
    assert [len(chunk.pixels) for chunk in chunks] == [4, 4, 1]
    assert copied == ["meta", device, device]
    assert counted.metrics() == {"data/videos_decoded_on_cpu": 1, "data/frames_decoded_on_cpu": 5}
    assert (
        "vp9.webm is decoded on the CPU from here on (torchcodec cannot decode it (RuntimeError: cuvid" in caplog.text
    )

    gpu.error = torch.OutOfMemoryError("CUDA out of memory")  # no fault of the file's
    with pytest.raises(torch.OutOfMemoryError):
        list(reader.chunks(4, device))

    # torchcodec itself may leave a file to the CPU.
    gpu.broken = frozenset()
    monkeypatch.setattr(sys.modules["torchcodec.decoders"].VideoDecoder, "cpu_fallback", True)
    list(reader.chunks(4, device))
    assert counted.metrics() == {"data/videos_decoded_on_cpu": 2, "data/frames_decoded_on_cpu": 14}
    assert "NVDEC does not decode such a file here" in caplog.text


def test_an_encoder_elsewhere_is_an_error_and_another_source_is_asked_as_ever(gpu, monkeypatch):
    source = FileFrames(str(clip("vp9.webm")), ON_ENCODER, open_video.__defaults__[0], 2, DecodeLimits())
    with pytest.raises(ValueError, match="needs the encoder on a CUDA device, but it is on cpu"):
        source.decoded_on(torch.device("cpu"))
    plain = dataclasses.replace(source, sampling=FEW)
    assert next(plain.decoded_on(torch.device("cuda"))).pixels.device.type == "cpu"
    with pytest.raises(ValueError, match="needs an encoder in this process"):
        RowRenderer(ChatReader(64), ON_ENCODER).try_options([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="decodes on a CUDA device, and there is none here"):
        check_decoder(ON_ENCODER)


def test_the_encoders_device_is_that_of_its_weights():
    family = vl_family()
    with torch.device("meta"):
        encoder = torch.nn.Linear(2, 2)
    model = types.SimpleNamespace(model=types.SimpleNamespace(visual=encoder))
    assert encoder_device(family, model) == torch.device("meta")
    assert np.prod(encoder.weight.shape) == 4
