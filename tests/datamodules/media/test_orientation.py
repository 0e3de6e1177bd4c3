import itertools
import struct

import av
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from longrl.datamodules.media.orientation import UPRIGHT, orientation_of
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import read_video
from longrl.datamodules.media.video import VideoReader
from longrl.types import FrameShard, UnusableSample
from tests.datamodules.media.test_video import ALL, display_matrix, write
from tests.tiny import vl_family

# Display matrix (a, b, c, d) -> the filters by which `ffmpeg` and its players obey it (fftools/ffmpeg_filter.c).
FILTERS = {
    (1, 0, 0, 1): (),
    (0, 1, -1, 0): (("transpose", "clock"),),
    (-1, 0, 0, -1): (("hflip", ""), ("vflip", "")),
    (0, -1, 1, 0): (("transpose", "cclock"),),
    (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),),
    (0, 1, 1, 0): (("transpose", "cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "clock_flip"),),
}


def filtered(path, filters):
    """All frames as FFmpeg's own filters turn them: [N, 3, H, W]."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            graph = av.filter.Graph()
            nodes = [graph.add_buffer(template=container.streams.video[0])]
            nodes += [graph.add(name, argument) for name, argument in filters] + [graph.add("buffersink")]
            for before, after in itertools.pairwise(nodes):
                before.link_to(after)
            graph.configure()
            nodes[0].push(frame)
            frames.append(nodes[-1].pull().to_ndarray(format="rgb24"))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("matrix", FILTERS)
@pytest.mark.parametrize("name", ["v.mp4", "v.mov", "v.mkv"])
def test_a_video_is_seen_as_players_show_it(tmp_path, name, matrix):
    options = {"noise": True, "pix_fmt": "yuv444p", "crf": "10"}  # no chroma is shared by neighbours that change sides
    path = write(tmp_path / name, 6, size=(64, 48), matrix=matrix, **options)
    frames = read_video(path, ALL)
    assert torch.equal(frames.pixels, filtered(path, FILTERS[matrix]))
    assert frames.pixels.shape[2:] == ((64, 48) if matrix[1] else (48, 64))


def test_height_and_width_change_places_before_anything_is_decoded(tmp_path):
    path = write(tmp_path / "v.mp4", 8, size=(128, 64), matrix=(0, 1, -1, 0))
    outline = VideoReader(path, ALL).outline
    assert tuple(outline.pixels.shape) == (0, 3, 128, 64)
    family = vl_family()
    assert family.outline_media(outline).grid_thw[1] == 2 * family.outline_media(outline).grid_thw[2]


def test_chunks_and_shards_of_a_turned_video_are_parts_of_it(tmp_path):
    path = write(tmp_path / "v.mp4", 20, size=(64, 48), matrix=(0, -1, 1, 0), noise=True)
    whole = read_video(path, ALL).pixels
    parts = [
        part.pixels
        for rank in range(3)
        for part in VideoReader(path, ALL, FrameShard(rank, 3), temporal_patch_size=2).chunks(3)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_turned_video_has_another_key_than_before_it_was_turned_and_others_have_the_same(tmp_path):
    """What a feature cache of before holds lies on its side."""
    import hashlib

    for matrix in ((1, 0, 0, 1), (0, 1, -1, 0)):
        path = write(tmp_path / "v.mp4", matrix=matrix)
        frames = read_video(path, VideoSampling(fps=2.0))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        before = hashlib.sha256(f"video {digest} PyAV {av.__version__} {list(frames.indices)}".encode()).hexdigest()
        assert (frames.key == before) is (matrix == (1, 0, 0, 1))


def test_other_angles_are_refused_with_a_command(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height = 64, 48
        stream.set_display_rotation(45)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(UnusableSample, match="turned by -45 degrees, which is no right angle; .*ffmpeg -i IN"):
        read_video(path, ALL)


@given(matrix=st.sampled_from(sorted(FILTERS)), degrees=st.floats(-0.9, 0.9), scale=st.floats(0.1, 4.0))
def test_a_matrix_nearly_of_right_angles_is_one(matrix, degrees, scale):
    a, b, c, d = (65536 * scale * value for value in matrix)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = (a * cos - b * sin, a * sin + b * cos, c * cos - d * sin, c * sin + d * cos)
    near = struct.pack("=9i", *(int(v) for v in (*turned[:2], 0, *turned[2:], 0, 0, 0, 1 << 30)))
    assert orientation_of(near) == orientation_of(struct.pack("=9i", *display_matrix(*matrix)))


@given(matrix=st.sampled_from(sorted(FILTERS)), height=st.integers(1, 5), width=st.integers(1, 5))
def test_pixels_go_where_the_matrix_sends_them(matrix, height, width):
    """A point (x, y) is shown at (a x + c y, b x + d y), moved to begin at 0."""
    a, b, c, d = matrix
    orientation = orientation_of(struct.pack("=9i", *display_matrix(*matrix)))
    stored = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    shown = orientation.turn(stored)
    assert shown.shape[:2] == orientation.size(height, width)
    points = {(x, y): (a * x + c * y, b * x + d * y) for x in range(width) for y in range(height)}
    left, top = (min(values) for values in zip(*points.values(), strict=True))
    for (x, y), (shown_x, shown_y) in points.items():
        assert (shown[shown_y - top, shown_x - left] == stored[y, x]).all()
    assert (orientation == UPRIGHT) is (matrix == (1, 0, 0, 1))
