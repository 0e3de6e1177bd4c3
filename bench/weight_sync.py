"""Hand-over of weights: from shards in few messages or in many, and to a server by each of three ways.

A Qwen2 model with as many tensors as a 7B's (28 layers, 339 names) and random weights is sharded by FSDP2 over two
ranks, each a process with one thread; they talk over gloo. Both variants bring every weight, whole, to every rank and
copy it into a tensor of the same size, as vLLM does:

- `bucket_mib` 0: `DTensor.full_tensor` of one after the other, as longrl did before;
- else: `engine_weights` with buckets of so many MiB of whole weights.

All variants run in one process per rank and take turns; reported is the median of the slower rank. What is received is
compared with the model in one piece, bit for bit, before anything is timed. Processes keep the memory that they free,
as a GPU's allocator does. A message between two processes of one CPU passes through its caches, so that here small
buckets are the fastest; between GPUs, where memory is faster than the wire, this says nothing about the best size.

The three ways to a server (`bench/weight_ways.py`), with a model of the same sizes, are a table of their own, `ways`.

    python bench/weight_sync.py --json bench/results/weight_sync.json
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from common import Row, parse_arguments, report
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from weight_ways import measure_ways

from longrl.engines.weight_stream import engine_weights
from longrl.models.text import TextFamily
from longrl.strategies.fsdp import ShardingOptions, shard_policy
from longrl.testing.gloo_ranks import run_on_ranks
from longrl.testing.tiny import tiny_text


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    ranks: int = 2
    buckets_mib: tuple[int, ...] = (0, 1, 4, 16, 64, 512)
    repeats: int = 9
    way_repeats: int = 5
    hidden_size: int = 512
    num_layers: int = 28
    vocab_size: int = 16_384


KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
"""Of glibc, as in the Makefile: to fetch pages anew may take longer than to fill them."""
FULL = Sizes()
QUICK = Sizes(buckets_mib=(0, 4, 512), repeats=3, way_repeats=3, hidden_size=256)


def measure(sizes: Sizes) -> list[Row]:
    """A row for each size of a bucket."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_text(folder, **model_sizes(sizes))
        with mock.patch.dict(os.environ, KEEP_MEMORY):
            by_rank = run_on_ranks(measure_rank, sizes.ranks, sizes, folder)
    rows: list[Row] = []
    for number, bucket_mib in enumerate(sizes.buckets_mib):
        results = [of_rank[number] for of_rank in by_rank]
        rows.append(
            {
                "ranks": sizes.ranks,
                "bucket_mib": bucket_mib,
                "tensors": results[0].tensors,
                "collectives": results[0].collectives,
                "seconds": max(result.seconds for result in results),
            }
        )
    return rows


def model_sizes(sizes: Sizes) -> dict[str, int]:
    """Of the model, as `tiny_text` takes them."""
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 4 * sizes.hidden_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }


@dataclass(frozen=True)
class Result:
    """Of one variant on one rank."""

    tensors: int
    collectives: int
    seconds: float
    """Median."""


def measure_rank(sizes: Sizes, folder: str) -> list[Result]:
    """This rank's part of every variant, in turns."""
    # 1. The model in one piece, and its shards.
    family = TextFamily(folder, random_init=True)
    model = family.build()
    wanted = {name: weight.clone() for name, weight in model.state_dict().items()}
    shard_policy(family, model, init_device_mesh("cpu", (sizes.ranks,)), ShardingOptions())
    engine = {name: torch.empty_like(weight) for name, weight in wanted.items()}

    # 2. Every weight arrives as it was.
    collectives = []
    for bucket_mib in sizes.buckets_mib:
        with CommDebugMode() as messages:
            sync(family, model, engine, bucket_mib)
        collectives.append(messages.get_total_counts())
        for name, weight in wanted.items():
            assert torch.equal(engine[name], weight), name
            engine[name].zero_()

    # 3. In turns, so that what disturbs one disturbs all.
    seconds: list[list[float]] = [[] for _ in sizes.buckets_mib]
    for _ in range(sizes.repeats):
        for bucket_mib, times in zip(sizes.buckets_mib, seconds, strict=True):
            dist.barrier()
            start = time.perf_counter()
            sync(family, model, engine, bucket_mib)
            times.append(time.perf_counter() - start)
    return [
        Result(len(wanted), count, statistics.median(times)) for count, times in zip(collectives, seconds, strict=True)
    ]


@torch.no_grad()
def sync(family: TextFamily, model: nn.Module, engine: dict[str, Tensor], bucket_mib: int) -> None:
    """Brings the trainer's weights into the engine's tensors."""
    weights = engine_weights(family, model, bucket_mib << 20) if bucket_mib else one_at_a_time(model)
    for name, weight in weights:
        engine[name].copy_(weight)


def one_at_a_time(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As longrl did before."""
    for name, weight in model.state_dict().items():
        yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    rows = measure(sizes)
    ways = measure_ways(model_sizes(sizes), sizes.way_repeats)
    before, *buckets = (float(row["seconds"]) for row in rows)
    notes = [f"the fastest takes {min(buckets) / before:.2f} of the time of one at a time; all bits are the same"]
    report(__file__, arguments, rows, notes, {"ways": ways})


if __name__ == "__main__":
    main()
