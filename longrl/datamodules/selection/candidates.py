"""The frames of a video that a selection chooses among: when they are on show, and small pictures of them.

A candidate is decoded at a small size, chunk by chunk, and let go of: what is kept of it, a grey or an embedding, is
kept by `SELECTED`. Letters: C candidates, F frames of a chunk, H and W height and width of a small picture.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longrl.datamodules.media.frame_index import FrameIndex
from longrl.datamodules.media.frame_lists import FRAME_LIST_SUFFIX, read_frame_list
from longrl.datamodules.media.opening import DecodeClock
from longrl.datamodules.media.remote import NO_REMOTE, RemoteMedia
from longrl.datamodules.media.sampling import VideoSampling
from longrl.datamodules.media.sources import DecodeLimits, open_video
from longrl.datamodules.media.video import FramePosition, known_index, opened_video
from longrl.types import UnusableSample

Pictures = NDArray[np.uint8]
"""[F, H, W, 3] RGB."""
DEFAULT_LIMITS = DecodeLimits()
CHUNK = 32
"""Small pictures in memory at once."""
MAX_BYTES = 256 << 20
"""Of what a process keeps of candidates: 500 videos of 1000 embeddings of 512 numbers would be 1 GiB."""
GREY = (0.299, 0.587, 0.114)


class KeptArrays:
    """Arrays by name within a budget, the least recently used let go of first.

    Args:
        max_bytes: of all arrays.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._arrays: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self._num_bytes = 0

    def get(self, name: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array of a name, made if it is not kept."""
        if name in self._arrays:
            self._arrays.move_to_end(name)
            return self._arrays[name]
        array = make()
        self._arrays[name] = array
        self._num_bytes += array.nbytes
        while self._num_bytes > self.max_bytes and len(self._arrays) > 1:
            _, oldest = self._arrays.popitem(last=False)
            self._num_bytes -= oldest.nbytes
        return array

    def clear(self) -> None:
        """Lets go of all of them."""
        self._arrays.clear()
        self._num_bytes = 0


KEPT = KeptArrays()
"""Greys and embeddings of this process's candidates: several questions ask about a video."""


class Candidates:
    """The frames of a video that a selection chooses among: what a function (video, question, count) is given as video.

    Args:
        path: of a local file or list of frames.
        sampling: how the video would be sampled; its span and what becomes of a torn file count.
        fps: candidates per second.
        most: candidates of a longer video, which are farther apart then.
        limits: what decoding may cost.
        remote: where frames of a list are copied to that lie elsewhere.

    Raises:
        UnusableSample: the file cannot be read.
    """

    def __init__(
        self,
        path: str,
        sampling: VideoSampling,
        fps: float,
        most: int,
        limits: DecodeLimits = DEFAULT_LIMITS,
        remote: RemoteMedia = NO_REMOTE,
    ) -> None:
        self.path = path
        spread = VideoSampling(fps=fps, min_frames=1, max_frames=most, span_s=sampling.span_s, torn=sampling.torn)
        self._sampling = spread
        self._limits = limits
        self._remote = remote
        reader = open_video(path, spread, remote=remote, limits=limits.media)
        self._outline = reader.outline
        self._indices = reader.indices
        self.duration_s = reader.outline.duration_s
        """Of the whole video."""
        start_s, end_s = sampling.span_s or (0.0, np.inf)
        self.span_s = (max(start_s - self._first_s, 0.0), min(end_s - self._first_s, self.duration_s))
        """The part that is asked about, in seconds from the first frame on."""
        self.times: NDArray[np.float64] = np.asarray(reader.outline.timestamps) - self._first_s
        """[C] increasing seconds from the video's first frame on at which candidates appear."""
        self.key = hashlib.sha256(f"{reader.outline.key} {self.times.tolist()}".encode()).hexdigest()
        """Names the candidates: by the file's content, and by which frames they are."""

    def __len__(self) -> int:
        return len(self.times)

    @property
    def key_times(self) -> NDArray[np.float64]:
        """[K] increasing seconds of the key frames, by the packets alone; of a list of frames those of all."""
        if self._is_list:
            times = np.asarray(read_frame_list(self.path).times) - self._first_s
        else:
            index = self._index
            times = index.starts[index.keys] - index.starts[0]
        start_s, end_s = self.span_s
        return times[(times >= start_s) & (times < end_s)]

    def greys(self, side: int = 32) -> NDArray[np.int16]:
        """[C, side, side] grey values from 0 to 255; pictures are squeezed to squares."""
        from torch import from_numpy
        from torch.nn.functional import interpolate

        def grey_of(pictures: Pictures) -> NDArray[np.int16]:
            grey = from_numpy(pictures @ np.asarray(GREY, np.float32))[:, None]  # [F, 1, H, W]
            squares = interpolate(grey, size=(side, side), mode="area")[:, 0]
            return squares.round().numpy().astype(np.int16)

        def read() -> NDArray[np.int16]:
            return np.concatenate([grey_of(pictures) for pictures in self.pictures(side)])

        return KEPT.get(("grey", self.key, side), read)

    def pictures(self, side: int) -> Iterator[Pictures]:
        """All candidates as pictures whose shorter side has so many pixels, or fewer where the video has, in chunks.

        Raises:
            UnusableSample: one cannot be decoded.
        """
        height, width = self._outline.pixels.shape[-2:]
        scale = min(1.0, side / min(height, width))
        size = max(round(height * scale), 1), max(round(width * scale), 1)
        frames = self._of_list(size) if self._is_list else self._of_file(size)
        while chunk := list(islice(frames, CHUNK)):
            yield np.stack(chunk)

    def _of_file(self, size: tuple[int, int]) -> Iterator[Pictures]:
        """[H, W, 3] of each candidate, never in the file's own size."""
        index = self._index
        small = replace(index, size=index.orientation.size(*size))  # as pictures are stored
        with opened_video(self.path, self._limits.media) as (container, stream):
            position = FramePosition(container, stream, index, DecodeClock(self.path, self._limits.media))
            for number in self._indices:
                frame = position.advance_to(number)
                if frame is None:
                    raise UnusableSample(self.path, f"it cannot be decoded (frame {number} is damaged or missing)")
                yield small.rgb_pixels(frame)

    def _of_list(self, size: tuple[int, int]) -> Iterator[Pictures]:
        from torch.nn.functional import interpolate

        reader = open_video(self.path, self._sampling, remote=self._remote, limits=self._limits.media)
        for chunk in reader.chunks(self._limits.frames_at_once(reader.outline)):
            pixels = chunk.pixels
            if tuple(pixels.shape[-2:]) != size:
                scaled = interpolate(pixels.float(), size=size, mode="bilinear", antialias=True)
                pixels = scaled.round_().clamp_(0, 255).byte()
            yield from pixels.permute(0, 2, 3, 1).numpy()

    @property
    def _is_list(self) -> bool:
        return self.path.endswith(FRAME_LIST_SUFFIX)

    @functools.cached_property
    def _first_s(self) -> float:
        """A list's times are counted from the video's beginning on, a file's from its first frame on."""
        return read_frame_list(self.path).times[0] if self._is_list else 0.0

    @property
    def _index(self) -> FrameIndex:
        return known_index(self.path, self._limits.media)
