"""Peak memory of real update steps, counted by torch's CPU allocator.

The profiler sees every allocation of the allocator and, but for those on gloo's threads, every free, so what is held is
known to the byte. Resident memory would add the pages that glibc keeps, the buffers of gloo and the imports, and would
miss blocks that are allocated but never written.
"""

from __future__ import annotations

import bisect
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from longrl.algorithms import Algorithm
from longrl.models.lora import LoRASettings
from longrl.models.qwen3_5 import Qwen3_5Family
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.strategies.fsdp import ShardingOptions
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.testing.tiny import tiny_qwen2_5_vl, tiny_qwen3_5
from longrl.types import Batch, Completion, FrameShard, Group, Prompt, SamplingParams
from tests.modules.test_policy import Given
from tests.tiny import frames, held, row

SIDE = 112
"""Pixels along a frame's edges: 16 tokens per temporal cell."""
TEXT = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 8192,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A real run: `cells` temporal cells of video per prompt, G = 4 completions of 64 tokens, 2 optimizer steps."""

    cells: int
    sp: int = 1
    checkpointing: bool = False
    kl: bool = False
    compute_dtype: str | None = None
    num_generations: int = 4
    completion_tokens: int = 64
    generate: bool = False
    lora: bool = False
    prefill_chunk_tokens: int = 16_384
    mlp_chunk: int | None = None
    vocabulary: int = TEXT["vocab_size"]
    hidden: int = TEXT["hidden_size"]
    strategy: bool = True
    hybrid: bool = False
    """A Qwen3.5: three gated delta nets, and a layer that attends."""
    pool: int | None = None
    """Temporal patches, and features along either side of a frame, that are averaged into one."""

    def family(self) -> Qwen2_5_VLFamily:
        kind, folder = (Qwen3_5Family, hybrid_folder) if self.hybrid else (Qwen2_5_VLFamily, wide_folder)
        return kind(
            folder(self.vocabulary, self.hidden), random_init=True, gradient_checkpointing=self.checkpointing,
            min_pixels=28 * 28, max_pixels=SIDE * SIDE, max_video_pixels=1 << 40,
            temporal_pool=self.pool, spatial_pool=self.pool,
            lora=LoRASettings(rank=8) if self.lora else None, mlp_chunk_tokens=self.mlp_chunk,
        )  # fmt: skip

    def prompt(self, family: Qwen2_5_VLFamily, shard: FrameShard, name: str = "v") -> Prompt:
        video = frames(2 * self.cells, SIDE, SIDE, name)
        return family.render(row("a"), "What?", [held(video, shard)])


def wide_folder(vocabulary: int, hidden: int) -> str:
    text = TEXT | {"vocab_size": vocabulary, "hidden_size": hidden}
    return str(tiny_qwen2_5_vl(tempfile.mkdtemp(prefix="longrl-wide-"), text=text))


def hybrid_folder(vocabulary: int, hidden: int) -> str:
    text = TEXT | {"vocab_size": vocabulary, "hidden_size": hidden, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    return str(tiny_qwen3_5(tempfile.mkdtemp(prefix="longrl-hybrid-"), text=text))


class Phases(Callback):
    """Encodes, perhaps generates, and notes when."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        mark("encode")
        batch.features = pl_module.features.get_or_encode(pl_module.model, batch.prompts)
        if self.case.generate:
            from longrl.engines.hf import HFEngine

            mark("rollout")
            sampling = SamplingParams(self.case.num_generations, self.case.completion_tokens)
            engine = HFEngine(prefill_chunk_tokens=self.case.prefill_chunk_tokens)
            with pl_module.policy.unsharded():
                engine.generate(pl_module.family, pl_module.model, batch.prompts, batch.features, sampling, seed=0)
        mark("update")

    def on_train_batch_end(self, *args: Any) -> None:
        mark("end")


def peaks(case: Case) -> dict[str, int]:
    """{phase: bytes} of this rank: the most that was held in each phase of the second step."""
    rank, family = torch.distributed.get_rank(), case.family()
    prompts = [case.prompt(family, FrameShard(rank, case.sp), name) for name in "vw"]  # on the host: not counted
    # This one parses its events when asked for them; here only their tree is read.
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiler:
        policy = PolicyModule(
            family, Algorithm(kl_coef=0.1 if case.kl else 0.0), OptimizerSettings(lr=1e-4),
            max_tokens_per_micro_batch=1 << 16, feature_cache_bytes=0,
        )  # fmt: skip
        strategy = MRSPStrategy(case.sp, sharding=ShardingOptions(compute_dtype=case.compute_dtype))
        batches = [Batch([prompt], groups=[group(case, prompt)]) for prompt in prompts]
        options = {"accelerator": "cpu", "strategy": strategy if case.strategy else "auto", "devices": case.sp}
        options |= {"max_epochs": 1, "logger": False}
        options |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        Trainer(callbacks=[Phases(case)], **options).fit(policy, datamodule=Given(batches, "rl"))
    return by_phase(profiler)


def group(case: Case, prompt: Prompt) -> Group:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 300, (case.num_generations, case.completion_tokens), generator=generator)
    completions = [Completion(own, torch.zeros(len(own)), "", "length") for own in ids]
    return Group(prompt, completions, torch.arange(len(ids)).float(), {}, torch.ones(len(ids), dtype=torch.bool))


def mark(phase: str) -> None:
    with torch.profiler.record_function(f"phase {phase}"):
        pass


def by_phase(profiler: Any) -> dict[str, int]:
    """{phase: most bytes held}; the last run of each counts, for the optimizer has state from the second step on."""
    held, phase, found = Held(), "start", {}
    events = flat(profiler.kineto_results.experimental_event_tree())
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag == torch._C._profiler._EventType.Allocation:
            held.count(event.extra_fields.ptr, event.extra_fields.alloc_size)
            found[phase] = max(found.get(phase, 0), held.bytes)
        elif event.name.startswith("phase "):
            phase = event.name.removeprefix("phase ")
            found[phase] = held.bytes
    return found


def flat(events: Iterable[Any]) -> Iterator[Any]:
    """A tree of events, each before those within it."""
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


class Held:
    """The blocks in use. gloo's threads free some that the profiler does not see go: an address that is handed out
    again must have been freed."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sizes: dict[int, int] = {}
        self._starts: list[int] = []

    def count(self, address: int, size: int) -> None:
        if size < 0:
            self._forget(address)
            return
        place = bisect.bisect_left(self._starts, address)
        if place and self._starts[place - 1] + self._sizes[self._starts[place - 1]] > address:
            self._forget(self._starts[place - 1])
            place -= 1
        while place < len(self._starts) and self._starts[place] < address + size:
            self._forget(self._starts[place])
        self._starts.insert(place, address)
        self._sizes[address] = size
        self.bytes += size

    def _forget(self, address: int) -> None:
        if address in self._sizes:
            self.bytes -= self._sizes.pop(address)
            self._starts.pop(bisect.bisect_left(self._starts, address))
