"""Inputs of recomputed layers, kept in host memory between forward and backward pass, copied beside computing.

torch's `save_on_cpu` and transformers' `offload` copy on the stream that computes, so every layer waits for its copy.
Here a stream of its own copies: out while the layer computes, back while the layer behind is computed again.

    forward     layer 1 | layer 2 | layer 3         backward            | layer 3 | layer 2 | layer 1
    copying     input 1 | input 2 | input 3                     input 3 | input 2 | input 1 |

A device never holds more of these inputs than one on its way out, or one in use and one on its way back.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class _Kept:
    """What autograd holds in place of a tensor."""

    host: Tensor
    """Its values, once `copied`."""
    device: torch.device
    before: _Kept | None
    """What was kept before it, and is read after it."""
    fetched: tuple[Tensor, Any] | None = None
    """On its way back: the tensor, and the event after which it is whole."""
    was_read: bool = False


class OffloadedCheckpoints(torch.autograd.graph.saved_tensors_hooks):
    """Context of one forward pass whose saved hidden states, tensors [B, l, D], wait in pinned host memory.

    Norms' weights [D] and variances [B, l, 1] stay where they are. On a CPU the same happens with torch's streams for
    CPUs, which do nothing: there is a copy, and no gain.

    Example:
        ```python
        with OffloadedCheckpoints():
            hidden = backbone(inputs_embeds=embeds)
        hidden.sum().backward()
        ```
    """

    def __init__(self) -> None:
        super().__init__(self._keep, self._read)
        self._last: _Kept | None = None
        self._leaving: tuple[Tensor, Any] | None = None
        """The input that is being copied out, and the event after which its memory may be another's."""

    def _keep(self, tensor: Tensor) -> Tensor | _Kept:
        """Begins to copy a tensor to the host; called in the forward pass."""
        if tensor.dim() != 3 or tensor.shape[-1] == 1:
            return tensor
        streams = torch.get_device_module(tensor.device)
        computing = streams.current_stream(tensor.device)
        copying = copy_stream(tensor.device)
        # 1. The copy of the one before had the time of a whole layer.
        self._let_go(computing)
        # 2. A copy sees what has been computed up to here.
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")
        copying.wait_event(computing.record_event())
        with streams.stream(copying):
            host.copy_(tensor, non_blocking=True)
        self._leaving = (tensor, copying.record_event())
        self._last = _Kept(host, tensor.device, self._last)
        return self._last

    def _read(self, kept: Tensor | _Kept) -> Tensor:
        """The tensor, back on its device; called in the backward pass, which reads the last one first."""
        if isinstance(kept, Tensor):
            return kept
        computing = torch.get_device_module(kept.device).current_stream(kept.device)
        self._let_go(computing)
        self._last = None
        if kept.fetched is None:
            self._fetch(kept)
        assert kept.fetched is not None
        tensor, is_there = kept.fetched
        kept.fetched = None
        kept.was_read = True
        computing.wait_event(is_there)
        # The layer that reads this one is about to be computed: meanwhile the next one comes.
        before = kept.before
        if before is not None and not before.was_read and before.fetched is None:
            self._fetch(before)
        return tensor

    def _let_go(self, computing: Any) -> None:
        """Frees the input that was copied out last.

        The allocator gives its memory to whatever the computing stream does next, so that stream waits for the copy.
        `record_stream` would free it only once the host has seen the copy end, which runs layers ahead of the device.
        """
        if self._leaving is not None:
            computing.wait_event(self._leaving[1])
            self._leaving = None

    def _fetch(self, kept: _Kept) -> None:
        """Begins to copy a tensor back."""
        streams = torch.get_device_module(kept.device)
        computing = streams.current_stream(kept.device)
        copying = copy_stream(kept.device)
        # Memory comes from the stream that computes, which may still read what lay there: the copy waits for it.
        tensor = torch.empty_like(kept.host, device=kept.device)
        copying.wait_event(computing.record_event())
        with streams.stream(copying):
            tensor.copy_(kept.host, non_blocking=True)
        kept.fetched = (tensor, copying.record_event())


@functools.cache
def copy_stream(device: torch.device) -> Any:
    """The stream that copies between a device and the host, one for all forward passes."""
    streams = torch.get_device_module(device)
    return streams.Stream() if device.type == "cpu" else streams.Stream(device=device)
