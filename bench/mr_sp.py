"""MR-SP on this machine: the update of one long sequence on two ranks against one, and whole steps by stage.

Every rank is a process with one thread; ranks talk over gloo, weights are sharded by FSDP2. All runs are longrl's own
code in float32 on a Qwen2.5-VL with random weights and a frozen vision encoder.

`rows`: one update (forward, backward, AdamW) of one group in one packed sequence, of `tokens` tokens, by `sp` ranks.
Peak memory is the most physical memory a rank held (VmHWM) beyond its peak before the pass, in a process of its own;
of two ranks the larger counts. Weights, gradients and optimizer state exist before.

`steps`: seconds of a whole RL step on two videos of `frames` frames by two ranks: rollout, old and reference
log-probabilities, update.

- no reuse: each rank has one video and encodes it anew wherever a pass or a completion reads it, 1 + 3 G times, as
  trainers without a feature cache do (see encode_once.py);
- stage 1: the two ranks encode half of each video, once, and gather; then each has one video's sequence;
- stage 1+2: as stage 1, and both ranks share both sequences.

    python bench/mr_sp.py --json bench/results/mr_sp.json
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import Row, parse_arguments, peak_memory_mib, report
from encode_once import Sizes as VisionSizes, family_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from longrl import types
from longrl.algorithms import Algorithm, single_rank
from longrl.engines.hf import HFEngine
from longrl.features.cache import FeatureCache
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.packing.pack import pack
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.strategies.fsdp import RootModule, ShardingOptions, shard_policy
from longrl.strategies.parallel import Parallel
from longrl.strategies.sequence import NO_SEQUENCE_PARALLEL, SequenceParallel
from longrl.types import FrameShard

VARIANTS = ("no reuse", "stage 1", "stage 1+2")


@dataclass(frozen=True)
class Sizes:
    """What a run measures."""

    tokens: tuple[int, ...] = (4096, 16_384)
    frames: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512, 1024)
    completions: int = 8
    response_tokens: int = 16
    repeats: int = 3
    timed_frames: int = 512
    """A step on more frames is timed once, after one on few."""
    model: VisionSizes = VisionSizes()  # noqa: RUF009  # frozen


FULL = Sizes()
QUICK = Sizes(tokens=(2048,), frames=(8, 32), repeats=1)


@dataclass(frozen=True)
class Ranks:
    """Two ranks or one, and what they do together."""

    sp: int
    """Ranks that share a sequence."""
    sp_group: int
    """Ranks that share the encoding of a video."""


# ------------------------------------------------------------------------------------------------------ processes


def on_ranks(function: Callable[..., Any], count: int, *arguments: Any) -> list[Any]:
    """[function(*arguments) on every rank], each in a new interpreter with one thread."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
        with ProcessPoolExecutor(count, mp_context=context) as pool, mock.patch.dict(os.environ, environment):
            started = [pool.submit(_rank, rank, count, folder, function, arguments) for rank in range(count)]
            return [each.result() for each in started]


def _rank(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=count)
    try:
        return function(*arguments)
    finally:
        dist.destroy_process_group()


def parallel_of(ranks: Ranks) -> Parallel:
    """The grid that MRSPStrategy would make."""
    world = Axis.of(None)
    mesh = init_device_mesh("cpu", (world.size,), mesh_dim_names=("shard",))
    sequence = SequenceParallel(world) if ranks.sp > 1 else NO_SEQUENCE_PARALLEL
    sp_group = world if ranks.sp_group > 1 else SINGLE_RANK
    wrap = partial(shard_policy, mesh=mesh, options=ShardingOptions())
    return Parallel(world=world, sp_group=sp_group, degrees={ranks.sp: sequence}, wrap=wrap)


# --------------------------------------------------------------------------------------------------------- update


def time_update(sizes: Sizes, folder: str, tokens: int, sp: int) -> tuple[float, float]:
    """Median seconds of an update, and the peak of memory it added in MiB, on this rank."""
    family = Qwen2_5_VLFamily(folder, random_init=True)
    parallel = parallel_of(Ranks(sp=sp, sp_group=1))
    model = family.build()
    policy = parallel.wrap(family, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    update = partial(_update, sizes, family, policy, parallel.degrees[sp], optimizer)
    update(256)  # the first pass of a process is slow, and makes gradients and optimizer state
    before = peak_memory_mib()
    seconds = [_seconds(partial(update, tokens)) for _ in range(sizes.repeats)]
    return statistics.median(seconds), peak_memory_mib() - before


def _update(
    sizes: Sizes,
    family: Qwen2_5_VLFamily,
    policy: RootModule,
    sequence: SequenceParallel,
    optimizer: torch.optim.Optimizer,
    tokens: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    answers = [torch.randint(50, 250, (sizes.response_tokens,), generator=generator) for _ in range(sizes.completions)]
    ids = torch.randint(50, 250, (tokens - sizes.completions * sizes.response_tokens,), generator=generator)
    prompt = types.Prompt("bench", ids, family.position_ids(ids, ()), (), types.Row("bench", "", ""))
    (packed,) = pack([prompt], [answers], max_tokens=1 << 62)
    logp = policy(packed, {}, 1.0, sequence).logp
    (-logp.mean()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def measure_update(sizes: Sizes, folder: str, tokens: int) -> list[Row]:
    """One rank, then two."""
    rows: list[dict[str, int | float]] = []
    for sp in (1, 2):
        found = on_ranks(time_update, sp, sizes, folder, tokens, sp)
        seconds, peak = (max(values) for values in zip(*found, strict=True))
        rows.append({"tokens": tokens, "sp": sp, "update_s": seconds, "peak_mib": peak})
    return [
        {**row, "speedup": rows[0]["update_s"] / row["update_s"], "peak_ratio": row["peak_mib"] / rows[0]["peak_mib"]}
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------------------- steps


class Step:
    """One RL step on two videos; the learning rate is 0, so that every repetition does the same work."""

    def __init__(self, sizes: Sizes, folder: str, num_frames: int, variant: str) -> None:
        self.sizes, self.reuses = sizes, variant != "no reuse"
        self.family = Qwen2_5_VLFamily(folder, random_init=True, **_pixels(sizes))
        self.parallel = parallel_of(Ranks(sp=2 if variant == "stage 1+2" else 1, sp_group=2 if self.reuses else 1))
        (self.sequence,) = self.parallel.degrees.values()
        policy, reference = self.family.build(), self.family.build().requires_grad_(False)
        self.policy, self.reference = (self.parallel.wrap(self.family, model) for model in (policy, reference))
        self.algorithm = Algorithm(kl_coef=0.01)
        self.optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0)
        sp_group = self.parallel.sp_group
        prompts = [self._prompt(f"video{i}", num_frames, FrameShard(sp_group.rank, sp_group.size)) for i in range(2)]
        self.own = prompts[dist.get_rank() :: 2]
        self.encoded = prompts if self.reuses else self.own
        self.updated = prompts if self.sequence.size > 1 else self.own

    def run(self) -> None:
        """The step, from patches to new weights."""
        cache = FeatureCache(self.family, parallel=self.parallel)
        encode = partial(self._cached, cache) if self.reuses else self._each
        answers = self._rollout(encode(self.policy, 1))
        (packed,) = pack(self.updated, answers, max_tokens=1 << 62)
        with torch.no_grad():
            old = self._logp(self.policy, packed, encode)
            reference = self._logp(self.reference, packed, encode)
        logp = self._logp(self.policy, packed, encode)
        count = len(answers) * self.sizes.completions
        lengths = torch.full((count,), self.sizes.response_tokens)
        valid = torch.ones(len(answers), self.sizes.completions, dtype=torch.bool)
        rewards = torch.arange(count, dtype=torch.float32).view_as(valid)
        weights = self.algorithm.token_weights(lengths, valid.flatten(), single_rank)[packed.completion_index]
        advantages = self.algorithm.token_advantages(rewards, valid, lengths)
        loss = self.algorithm.loss(logp, old, reference, old, advantages, weights, packed.completion_index).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _cached(self, cache: FeatureCache, policy: RootModule, samples: int) -> Mapping[str, Tensor]:
        return cache.get_or_encode(policy.model, self.encoded)

    def _each(self, policy: RootModule, samples: int) -> Mapping[str, Tensor]:
        features = {}
        for _ in range(samples):
            for prompt in self.own:
                (features[prompt.media[0].key],) = self.family.encode_media(policy.model, prompt.media)
        return features

    def _rollout(self, features: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Each rank answers its own prompt; ranks that share sequences tell each other."""
        sampling = types.SamplingParams(self.sizes.completions, self.sizes.response_tokens)
        engine = HFEngine()
        with self.policy.unsharded():
            found = engine.generate(self.family, self.policy.model, self.own, features, sampling, seed=0)
        # an answer may end early by chance; all have the same length here, so that variants do the same work
        own = [[_filled(completion.token_ids, self.sizes.response_tokens) for completion in group] for group in found]
        if self.sequence.size == 1:
            return own
        return [group for rank in self.parallel.world.gather(own) for group in rank]

    def _logp(self, policy: RootModule, packed: types.Packed, encode: Callable[..., Mapping[str, Tensor]]) -> Tensor:
        with torch.no_grad():
            features = encode(policy, self.sizes.completions)
        return policy(packed, features, 1.0, self.sequence).logp

    def _prompt(self, name: str, num_frames: int, shard: FrameShard) -> types.Prompt:
        size, generator = self.sizes.model.frame_size, torch.Generator().manual_seed(sum(map(ord, name)))
        held = shard.frames(num_frames, self.family.temporal_patch_size)
        pixels = torch.randint(0, 256, (len(held), 3, size, size), dtype=torch.uint8, generator=generator)
        frames = types.Frames("video", pixels, tuple(map(float, range(num_frames))), name, float(num_frames))
        return self.family.render(types.Row(id=name, problem="", answer=""), "What happens?", [frames])


def _filled(ids: Tensor, length: int) -> Tensor:
    return torch.cat([ids, ids.new_zeros(length - len(ids))])


def _pixels(sizes: Sizes) -> dict[str, int]:
    return dict.fromkeys(("min_pixels", "max_pixels"), sizes.model.frame_size**2)


def time_step(sizes: Sizes, folder: str, num_frames: int, variant: str) -> float:
    """Median seconds of a step on this rank."""
    Step(sizes, folder, min(sizes.frames), variant).run()  # the first passes of a process are slow
    step = Step(sizes, folder, num_frames, variant)
    repeats = 1 if num_frames > sizes.timed_frames else sizes.repeats
    return statistics.median(_seconds(step.run) for _ in range(repeats))


def measure_step(sizes: Sizes, folder: str, num_frames: int) -> Row:
    """Seconds by variant, and how many times faster than without reuse."""
    seconds = {variant: max(on_ranks(time_step, 2, sizes, folder, num_frames, variant)) for variant in VARIANTS}
    base = seconds["no reuse"]
    return {
        "frames": num_frames,
        "no_reuse_s": base,
        "stage_1_s": seconds["stage 1"],
        "stage_1_2_s": seconds["stage 1+2"],
        "stage_1_speedup": base / seconds["stage 1"],
        "stage_1_2_speedup": base / seconds["stage 1+2"],
    }


def _seconds(action: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def main(argv: Sequence[str] | None = None, sizes: Sizes | None = None) -> None:
    """The command; `sizes` replaces what `--quick` or its absence choose."""
    arguments = parse_arguments(__doc__, argv)
    sizes = sizes or (QUICK if arguments.quick else FULL)
    with tempfile.TemporaryDirectory() as folder:
        family_of(sizes.model, Path(folder))
        rows = [row for tokens in sizes.tokens for row in measure_update(sizes, folder, tokens)]
        steps = [measure_step(sizes, folder, count) for count in sizes.frames]
    settings = ", ".join(f"{name} {value}" for name, value in vars(replace(sizes)).items())
    report(__file__, arguments, rows, notes=[f"sizes: {settings}"], more={"steps": steps})


if __name__ == "__main__":
    main()
