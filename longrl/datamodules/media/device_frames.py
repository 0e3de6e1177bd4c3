"""Frames that torchcodec decodes on the encoder's GPU, and on the CPU where NVDEC cannot.

A loader has seen of such a video no more than its ends, and its row can no longer be skipped once it is being encoded.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from longrl.datamodules.media.decoders import CPU, TorchcodecFrames, check_shown_size
from longrl.datamodules.media.frame_index import FrameIndex
from longrl.datamodules.media.opening import MediaLimits
from longrl.types import UnusableSample

logger = logging.getLogger(__name__)


class Fallbacks:
    """How often this process decoded on the CPU what was to be decoded on its GPU."""

    def __init__(self) -> None:
        self.num_videos = 0
        """Passes over videos, or over a rank's part of one."""
        self.num_frames = 0
        """Frames in them; what torchcodec itself leaves to the CPU is counted whole."""

    def metrics(self) -> dict[str, float]:
        """Both by name."""
        return {
            "data/videos_decoded_on_cpu": float(self.num_videos),
            "data/frames_decoded_on_cpu": float(self.num_frames),
        }


FALLBACKS = Fallbacks()
"""Of this process."""


class DeviceFrames:
    """Frames of a file on a CUDA device; see `DecodesFrames`.

    From the first chunk on that NVDEC does not give exactly, torchcodec decodes on the CPU and pixels are copied; so it
    does of itself with formats that the device has no circuits for. Either is logged and counted in `FALLBACKS`.

    Args:
        path: of the file.
        index: its frames.
        limits: what decoding on the CPU may cost.
        device: where the pixels are.
    """

    def __init__(self, path: str | Path, index: FrameIndex, limits: MediaLimits, device: torch.device) -> None:
        self._path = path
        self._index = index
        self._limits = limits
        self._device = device
        self._on_device: TorchcodecFrames | None = None
        self._on_cpu: TorchcodecFrames | None = None
        self._is_counted = False

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """See `DecodesFrames`.

        Raises:
            UnusableSample: the CPU cannot decode them either.
        """
        if self._on_cpu is None:
            try:
                return self._decoded_on_device(indices)
            except UnusableSample as error:
                self._note(error.reason)
                self._on_device = None  # with its memory
                self._on_cpu = TorchcodecFrames(self._path, self._index, self._limits, CPU)
        FALLBACKS.num_frames += len(indices)
        return self._on_cpu.pixels(indices).to(self._device)

    def _decoded_on_device(self, indices: Sequence[int]) -> Tensor:
        if self._on_device is None:
            self._on_device = TorchcodecFrames(self._path, self._index, self._limits, self._device)
        pixels = self._on_device.pixels(indices)
        check_shown_size(self._path, "torchcodec", pixels, self._index.shown_size)
        if self._on_device.is_left_to_cpu:
            self._note("torchcodec says that NVDEC does not decode such a file here")
            FALLBACKS.num_frames += len(indices)
        return pixels

    def _note(self, reason: str) -> None:
        if self._is_counted:
            return
        self._is_counted = True
        FALLBACKS.num_videos += 1
        logger.warning(
            "data.video.decode_on=encoder: %s is decoded on the CPU from here on (%s); so were %d videos so far",
            self._path, reason, FALLBACKS.num_videos,
        )  # fmt: skip
