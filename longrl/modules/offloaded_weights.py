"""Frozen weights that lie in host memory and are on the device only while they are used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longrl.types import to_device


class OffloadedWeights:
    """A frozen model of one device, kept in the host's memory. Nothing is copied back, for nothing changes.

    Args:
        model: on the host; its weights become pinned where there is a GPU.
        device: where it computes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._hosted: list[tuple[Tensor, Tensor]] = []
        """Parameters and buffers, and their values in host memory."""
        for tensor in [*model.parameters(), *model.buffers()]:
            value = tensor.data
            if device.type == "cuda" and value.device.type == "cpu":
                value = value.pin_memory()
                tensor.data = value
            self._hosted.append((tensor, value))

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the model is on the device."""
        try:
            for tensor, value in self._hosted:
                tensor.data = to_device(value, self.device)
            yield
        finally:
            for tensor, value in self._hosted:
                tensor.data = value
