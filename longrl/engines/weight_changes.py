"""Weights as what changed in them: a folder of numbers that are other bits than before, and where they stand.

In bfloat16 most weights stay the same bits over an update at usual learning rates: a step of 1e-6 is far below the
distance to the next number, 2^-8 of the weight. Of a weight that changed in places, the indices and the new values are
written; of one that changed in more than a third or so of them, all of it. A checksum of the new content says whether
the receiver had the content of before.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from longrl.engines.vllm_extension import read_shards
from longrl.engines.weight_checks import Shapes, list_files

CHECKSUMS = "checksums.json"
"""{name: CRC-32 of its new content} of the weights in a folder."""
WHOLE, INDICES, VALUES = "whole:", "indices:", "values:"
"""What stands before a weight's name in a folder of changes."""
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of so many bytes."""
MAX_CHECKSUM_BYTES = 1 << 26


class ChangeLog:
    """What was sent last, on the host, and how weights differ from it.

    It holds one set of weights in the engine's precision.
    """

    def __init__(self) -> None:
        self._sent: dict[str, Tensor] = {}
        self.checksums: dict[str, int] = {}
        """Of all weights that were looked at since `begin`, by their names, if they changed."""

    def begin(self, from_nothing: bool) -> None:
        """Looks at a new set of weights.

        Args:
            from_nothing: nothing of before counts.
        """
        self.checksums = {}
        if from_nothing:
            self._sent = {}

    def changes(self, weights: Iterator[tuple[str, Tensor]], precisions: Shapes) -> Iterator[tuple[str, Tensor]]:
        """What to write of weights, which count as sent from then on.

        Args:
            weights: names and whole tensors.
            precisions: of the engine, to which they are rounded before they are compared.
        """
        for name, weight in weights:
            now = weight.detach().to(precisions[name][1]).cpu().reshape(-1)
            before = self._sent.get(name)
            if before is None:
                self._sent[name] = now.clone() if now.data_ptr() == weight.data_ptr() else now
                self.checksums[name] = checksum(now)
                yield WHOLE + name, now.view(weight.shape)
                continue
            indices = (_bits(now) != _bits(before)).nonzero()[:, 0]
            if not len(indices):
                continue
            values = now[indices]
            before.copy_(now)
            self.checksums[name] = checksum(now)
            narrow = indices.to(torch.int32) if len(now) < 1 << 31 else indices
            if narrow.nbytes + values.nbytes < now.nbytes:
                yield INDICES + name, narrow
                yield VALUES + name, values
            else:
                yield WHOLE + name, now.view(weight.shape)

    def everything(self, precisions: Shapes) -> Iterator[tuple[str, Tensor]]:
        """All weights that count as sent, as `changes` gives whole ones; fills `checksums` with all."""
        for name, weight in self._sent.items():
            self.checksums[name] = checksum(weight)
            yield WHOLE + name, weight.view(precisions[name][0])


def write_checksums(folder: Path, checksums: Mapping[str, int]) -> None:
    """Puts checksums beside the files that they are of."""
    (folder / CHECKSUMS).write_text(json.dumps(checksums))


def read_changes(folder: Path, expected: Shapes) -> Iterator[tuple[str, Tensor | None, Tensor]]:
    """Names, indices and new values of a folder of changes; no indices are those of all of a weight.

    Raises:
        ValueError: they are not of the model's weights.
    """
    list_files(folder)  # none from elsewhere
    indices: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for key, tensor in read_shards(folder):
        kind, name = key.partition(":")[0] + ":", key.partition(":")[2]
        if name not in expected or kind not in (WHOLE, INDICES, VALUES):
            raise ValueError(f"{folder} has changes of {key[:200]!r}, which is no weight of the server's model")
        shape, dtype = expected[name]
        if kind != INDICES and tensor.dtype != dtype:
            raise ValueError(f"changes of {name!r} are of {tensor.dtype} instead of {dtype}")
        if kind == WHOLE:
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name!r} is {list(tensor.shape)} instead of {list(shape)}")
            yield name, None, tensor.reshape(-1)
            continue
        (indices if kind == INDICES else values)[name] = tensor
        if name in indices and name in values:  # they may lie in two files
            at, new = indices.pop(name), values.pop(name)
            numel = torch.Size(shape).numel()
            if at.dtype not in (torch.int32, torch.int64) or at.shape != new.shape or at.dim() != 1 or not len(at):
                raise ValueError(f"changes of {name!r} must be as many indices as values")
            if int(at.min()) < 0 or int(at.max()) >= numel:
                raise ValueError(f"changes of {name!r} are not within its {numel} numbers")
            yield name, at.long(), new
    if indices or values:
        raise ValueError(f"{folder} has half of the changes of {next(iter(indices | values))!r}")


def read_checksums(folder: Path) -> dict[str, int]:
    """What `write_checksums` wrote.

    Raises:
        ValueError: there is nothing of the kind.
    """
    try:
        with (folder / CHECKSUMS).open("rb") as file:
            found = json.loads(file.read(MAX_CHECKSUM_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CHECKSUMS} cannot be read ({error}); write the weights again") from error
    if not isinstance(found, dict) or not all(isinstance(value, int) for value in found.values()):
        raise ValueError(f"{folder / CHECKSUMS} must map names to numbers")
    return found


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a contiguous CPU tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])
