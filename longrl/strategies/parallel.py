"""How the ranks of a run share its work: who has other prompts, and who has other rows of the same sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn
from typing_extensions import override

from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.strategies.fsdp import RootModule, ShardableFamily
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import Dtype


@dataclass(frozen=True)
class Parallel:
    """The grid of ranks; the default is one rank that does everything.

    The ranks of a sequence-parallel group have the same prompts. Of a batch with long sequences all of them share every
    sequence; of one with short sequences, where the degree is chosen per batch, smaller parts of the group take turns.
    """

    device: torch.device | None = None
    """What this rank computes on, also where offload keeps its weights in host memory; None is where they are."""
    world: Axis = SINGLE_RANK
    dp: Axis = SINGLE_RANK
    """Data parallelism: one rank of each sequence-parallel group; they have other prompts."""
    sp_group: Axis = SINGLE_RANK
    """The sequence-parallel group of this rank."""
    degrees: Mapping[int, SequenceParallel] = field(default_factory=lambda: {1: NO_SEQUENCE_PARALLEL})
    """How many neighbouring ranks of the group may share a sequence; one entry unless it is chosen per batch."""
    num_gather_chunks: int = 1
    """Messages in which features are gathered: more of them need less memory beside the result."""
    compute_dtype: Dtype | None = None
    """Precision in which sharded weights are gathered to compute with; None is their own."""
    wrap: Callable[[ShardableFamily, nn.Module], RootModule] = RootModule
    """Makes a model a policy, sharded over the ranks if there are several."""
    wrap_offloaded: Callable[[ShardableFamily, nn.Module], RootModule] | None = None
    """The same with the shards in host memory, whatever those of the policy; None where nothing is sharded."""


SINGLE_RANK_GRID = Parallel()
"""One rank that does everything."""


class ParallelModule(LightningModule):
    """A LightningModule that trains a model family on a grid of ranks."""

    family: ShardableFamily
    """Describes the model."""
    parallel: Parallel
    """The grid; a strategy sets it before weights are loaded."""

    @property
    @override
    def device(self) -> torch.device:
        """What this rank computes on."""
        return self.parallel.device or super().device

    def before_load(self, checkpoint: Path) -> None:
        """`MRSPStrategy` calls it before it reads a checkpoint, all of whose names must then be in the module."""
