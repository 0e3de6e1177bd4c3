"""Memory of gated delta nets (longrl/packing/delta_net.py), one formula for each kind, taken from the code it names.

Letters as in `longrl.planning.formulas`, and: V value heads with keys of E and values of F numbers, C channels of the
convolution, in chunks of c rows. Of several ranks each has L rows of its heads. On CUDA the kernels are
flash-linear-attention's: what they save is read in its sources (fla/ops/gated_delta_rule/chunk.py), and not measured.
Plain tensor operations, always in float32, are counted as a layer on a CPU saves them; tests compare.
"""

from __future__ import annotations

from dataclasses import dataclass

from longrl.packing.delta_kernels import CHUNK_ROWS
from longrl.planning.inputs import Plan

FLOAT32 = 4


@dataclass(frozen=True)
class LocalWidths:
    """Numbers per row of what one rank computes of a layer, and the rows."""

    rows: int
    channels: int
    """C."""
    keys: int
    """V E, a key for every value head."""
    values: int
    """V F."""
    chunk: int
    """V c."""
    states: float
    """V E F / c, a state at the start of every chunk."""


def local_widths(plan: Plan, rows: int) -> LocalWidths:
    """Of this rank's `rows` rows of all heads, or of all rows of its heads."""
    delta, ranks = plan.sizes.delta_nets, plan.sequence_parallel_size
    assert delta is not None, "no layer has one"
    heads, key_heads = delta.num_heads, delta.num_key_heads
    if ranks > 1:
        layout = plan.delta_heads
        heads, key_heads = layout.per_rank * layout.size, layout.per_rank
    return LocalWidths(
        rows=rows * ranks,
        channels=2 * key_heads * delta.key_size + heads * delta.value_size,
        keys=heads * delta.key_size,
        values=heads * delta.value_size,
        chunk=heads * CHUNK_ROWS,
        states=heads * delta.key_size * delta.value_size / CHUNK_ROWS,
    )


def saved_memory(plan: Plan, rows: int) -> float:
    """Between a layer's first norm and its last product, for the backward pass; norms and MLP apart.

    CUDA: inputs of convolution and SiLU, 2 L C b; normalised queries and keys, values and the system of a chunk,
    L (2 V E + V F + V c) b; of the gated norm, four in float32 and three more, V F (16 + 3 b). Plain: 3 L C b, and
    in float32 L (14 V E + 10 V F + 5 V c + 2 V E F / c).
    """
    width, b = local_widths(plan, rows), plan.matmul_bytes
    if not plan.cuda:
        rule = 14 * width.keys + 10 * width.values + 5 * width.chunk + 2 * width.states
        return width.rows * (3 * width.channels * b + rule * FLOAT32)
    rule = (2 * width.channels + 2 * width.keys + width.values + width.chunk) * b
    return width.rows * (rule + width.values * (4 * FLOAT32 + 3 * b))


def backward_memory(plan: Plan, rows: int) -> float:
    """What the rule's backward pass needs beside that.

    CUDA: states of all chunks and what is written, again, and gradients of all these and of queries, keys and values:
    L (2 V E F / c + 5 V E + 4 V F) b. Plain: L 2 V F, as the first saved tensors go while the first gradients come.
    Of several ranks the message of the all-to-all, before and after.
    """
    width, b = local_widths(plan, rows), plan.matmul_bytes
    message = 2 * (width.channels + width.values) * b if plan.sequence_parallel_size > 1 else 0
    if not plan.cuda:
        return width.rows * (2 * width.values * FLOAT32 + message)
    return width.rows * ((2 * width.states + 5 * width.keys + 4 * width.values) * b + message)


def forward_memory(plan: Plan, rows: int) -> float:
    """Without gradient, at its widest, beside the stream.

    CUDA: channels three times, queries and keys as they are and normalised, what is written and read, systems and
    states: L (3 C + 5 V E + 4 V F + V c + V E F / c) b. Plain: L (3 C b + 4 (12 V E + 7 V F + 3 V c)).
    """
    width, b = local_widths(plan, rows), plan.matmul_bytes
    if not plan.cuda:
        plain = 12 * width.keys + 7 * width.values + 3 * width.chunk
        return width.rows * (3 * width.channels * b + plain * FLOAT32)
    rule = 5 * width.keys + 4 * width.values + width.chunk + width.states
    return width.rows * (3 * width.channels + rule) * b


def state_memory(plan: Plan, sequences: int) -> float:
    """States of so many sequences in all layers that have them: 4 V E F + (taps - 1) C b each."""
    delta = plan.sizes.delta_nets
    return float(sequences * delta.num_layers * delta.state_bytes(plan.matmul_bytes)) if delta else 0.0
