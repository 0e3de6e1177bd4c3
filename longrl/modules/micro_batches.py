"""Micro-batches of a step and their scores, on any grid of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from longrl.models.base import CausalFamily
from longrl.packing.pack import dummy_micro_batch, pack
from longrl.strategies.fsdp import Entry
from longrl.strategies.parallel import Parallel
from longrl.strategies.sequence import SequenceParallel
from longrl.types import Packed, PolicyOutput, Prompt


def split(
    parallel: Parallel, budget: int, prompts: Sequence[Prompt], completions: Sequence[Sequence[Tensor]]
) -> tuple[list[Packed | None], SequenceParallel]:
    """This rank's micro-batches, and the ranks that share each.

    None stands for one to wait through, so that all ranks of the run have the same number: gathering sharded weights
    needs all of them.

    Args:
        parallel: the grid of ranks.
        budget: tokens of a micro-batch on one rank.
        prompts: P prompts of the team.
        completions: token ids of each prompt's completions.
    """
    sizes = [len(p.input_ids) + sum(map(len, own)) for p, own in zip(prompts, completions, strict=True)]
    sequence = parallel.sequence_for(max(sizes, default=1), budget)
    packed = pack(prompts, completions, budget * sequence.size)
    turns = parallel.sp_group.size // sequence.size
    count = parallel.dp.max(-(-len(packed) // turns))
    own = packed[parallel.sp_group.rank // sequence.size :: turns]
    return own + [None] * (count - len(own)), sequence


def scores(
    family: CausalFamily,
    entry: Entry,
    packed: Packed | None,
    features: Mapping[str, Tensor],
    temperature: float,
    sequence: SequenceParallel,
) -> PolicyOutput:
    """A micro-batch through the model behind `entry`; for None the smallest there is."""

    def forward() -> tuple[Tensor, Tensor]:
        found = packed or dummy_micro_batch(family.num_axes)
        output = family.forward(entry.model, found, features, temperature, sequence)
        return output.logp, output.entropy

    return PolicyOutput(*entry(forward))
