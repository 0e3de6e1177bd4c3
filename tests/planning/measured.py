"""Peak memory of real update steps, counted by torch's CPU allocator.

The profiler's `[memory]` events are every allocation and every free of the allocator, so their running sum is what is
held, to the byte. Resident memory would add the pages that glibc keeps, the buffers of gloo's threads and the imports,
and would miss blocks that are allocated but never written.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import torch
from lightning.pytorch import Callback

from longrl.algorithms import Algorithm
from longrl.models.qwen_vl import Qwen2_5_VLFamily
from longrl.models.tiny import tiny_qwen2_5_vl
from longrl.modules.policy import OptimizerSettings, PolicyModule
from longrl.strategies.fsdp import ShardingOptions
from longrl.strategies.mr_sp import MRSPStrategy
from longrl.types import Batch, Completion, Group, Prompt, SamplingParams
from tests.modules.test_policy import train
from tests.tiny import frames, held, row
from longrl.strategies.frames import Share

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

    def family(self) -> Qwen2_5_VLFamily:
        return Qwen2_5_VLFamily(
            wide_folder(), random_init=True, gradient_checkpointing=self.checkpointing, min_pixels=28 * 28,
            max_pixels=SIDE * SIDE, max_video_pixels=1 << 40,
        )  # fmt: skip

    def prompt(self, family: Qwen2_5_VLFamily, share: Share) -> Prompt:
        video = frames(2 * self.cells, SIDE, SIDE, "v")
        return family.render(row("a"), "What?", [held(video, share)])


def wide_folder() -> str:
    return str(tiny_qwen2_5_vl(tempfile.mkdtemp(prefix="longrl-wide-"), text=TEXT))


class Phases(Callback):
    """Encodes, perhaps generates, and notes when."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        mark("encode")
        batch.features = pl_module.encode(batch.prompts)
        if self.case.generate:
            from longrl.rollout.engine import HFEngine

            mark("rollout")
            sampling = SamplingParams(self.case.num_generations, self.case.completion_tokens)
            pl_module.with_whole_weights(
                lambda: HFEngine().generate(
                    pl_module.family, pl_module.model, batch.prompts, batch.features, sampling, seed=0
                )
            )
        mark("update")

    def on_train_batch_end(self, *args: Any) -> None:
        mark("end")


def peaks(case: Case) -> dict[str, int]:
    """{phase: bytes} of this rank: the most that was held in each phase of the second step."""
    rank, family = torch.distributed.get_rank(), case.family()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        prompt = case.prompt(family, Share(rank, case.sp))
        policy = PolicyModule(
            family, Algorithm(kl_coef=0.1 if case.kl else 0.0), OptimizerSettings(lr=1e-4),
            max_tokens_per_micro_batch=1 << 16, feature_cache_bytes=0,
        )  # fmt: skip
        strategy = MRSPStrategy(case.sp, sharding=ShardingOptions(compute_dtype=case.compute_dtype))
        batches = [Batch([prompt], groups=[group(case, prompt)]) for _ in range(2)]
        options = {"strategy": strategy, "devices": case.sp, "max_epochs": 1}
        train(policy, *batches, callbacks=[Phases(case)], **options)
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
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held, phase, found = 0, "start", {}
    for event in events:
        if event.name().startswith("phase "):
            phase = event.name().removeprefix("phase ")
            found[phase] = held
        elif event.name() == "[memory]":
            held += event.nbytes()
            found[phase] = max(found.get(phase, 0), held)
    return found
