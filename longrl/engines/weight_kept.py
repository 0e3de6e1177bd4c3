"""Weights that a server keeps on its own machine, so that a trainer has to bring no more than what changed in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longrl.engines.vllm_extension import INDEX, write_shards
from longrl.engines.weight_changes import checksum, read_changes, read_checksums
from longrl.engines.weight_checks import Shapes
from longrl.engines.weight_files import new_folder

SHARD_BYTES = 1 << 30
FILE_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Precisions by the names that safetensors has for them."""


class KeptWeights:
    """One set of weights in files of the server's machine, which its workers read.

    Args:
        parent: for a folder of its own; in shared memory it takes as much of that as the weights have bytes.
        expected: of the server's model.
    """

    def __init__(self, parent: Path, expected: Shapes) -> None:
        self.parent = parent
        self.expected = expected
        self.version = ""
        """Of the weights that are kept; "" if there are none, or some that were half changed."""
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """For `longrl_load_weights`."""
        assert self._folder is not None
        return self._folder

    def take(self, changes: Path, base: str, version: str) -> None:
        """Puts changes into what is kept.

        Args:
            changes: folder of `ChangeLog`.
            base: version that they are changes of; "" is nothing, so that all weights are there.
            version: that is kept afterwards.

        Raises:
            ValueError: the changes are of other weights, or not of this model.
        """
        if base and base != self.version:
            raise ValueError(f"the server keeps weights {self.version!r}, and was sent changes of {base!r}")
        checksums = read_checksums(changes)
        self.version = ""
        if not base:
            self._make_room()
        self._change(changes, checksums, all_of_them=not base)
        self.version = version

    def close(self) -> None:
        """Deletes the files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        self.version = ""

    def _make_room(self) -> None:
        """Files for all weights, with zeros."""
        self.close()
        self._folder = new_folder(self.parent)
        zeros = ((name, torch.zeros(shape, dtype=dtype)) for name, (shape, dtype) in self.expected.items())
        write_shards(zeros, self._folder, SHARD_BYTES)

    def _change(self, changes: Path, checksums: Mapping[str, int], all_of_them: bool) -> None:
        kept = mapped_shards(self.folder)
        changed = set()
        for name, indices, values in read_changes(changes, self.expected):
            if indices is None:
                kept[name].copy_(values)
            else:
                kept[name][indices] = values
            changed.add(name)
        missing = (self.expected.keys() if all_of_them else checksums.keys()) - changed
        if missing:
            raise ValueError(f"{changes} lacks {min(missing)!r}; write the weights again")
        for name in changed:
            if checksum(kept[name]) != checksums.get(name):
                raise ValueError(
                    f"{name!r} is not what the trainer has after its changes: they came damaged, or were not of these "
                    "weights; the next sync sends all"
                )


def mapped_shards(folder: Path) -> dict[str, Tensor]:
    """{name: flat tensor} of a folder of `write_shards`; what is written to a tensor is in its file."""
    tensors = {}
    for file in json.loads((folder / INDEX).read_text()):
        path = folder / file
        content = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
        # https://huggingface.co/docs/safetensors#format: 8 bytes of the header's length, the header, the tensors
        length = int.from_bytes(content[:8].numpy().tobytes(), "little")
        header = json.loads(content[8 : 8 + length].numpy().tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = content[start:stop].view(FILE_DTYPES[entry["dtype"]])
    return tensors
