"""From the parts of a run to its plan: memory, time, and what would fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longrl.algorithms import keep_all
from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.engines.hf import HFEngine
from longrl.engines.rollout_engine import RolloutEngine
from longrl.engines.server import VLLMServerEngine
from longrl.engines.vllm import VLLMEngine
from longrl.io.number_ranges import COUNT, NOT_NEGATIVE, check_ranges
from longrl.models.base import CausalFamily
from longrl.modules.eight_bit import MOMENT_BYTES
from longrl.modules.policy import PolicyModule
from longrl.modules.token_statistics import statistics_passes
from longrl.planning import flops, memory, shapes, teachers
from longrl.planning.formulas import MemoryParts
from longrl.planning.hardware import GIB, Hardware, find_hardware
from longrl.planning.inputs import ModelSizes, Plan, VLLMShare
from longrl.planning.micro_batches import needed_budget
from longrl.strategies.mr_sp import MRSPStrategy, check_sizes, sp_group_size_of
from longrl.types import Frames, Media, SamplingParams

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
DEGREES = (1, 2, 4, 8, 16, 32)
NAMED_ALIKE = frozenset(
    ("gradient_checkpointing", "offload_checkpoints", "mlp_chunk_tokens", "num_replicas", "num_gather_chunks",
     "max_sequences", "prefill_chunk_tokens")
)  # fmt: skip
"""Options of family, strategy and engine that a `Plan` has under the same name."""


@dataclass(frozen=True)
class PlanOptions:
    """Options of a plan beside the run's own config."""

    hardware: str = "H100"
    """A100, H100 or H200: nodes of 8."""
    memory_gib: float | None = None
    """Memory of a device, instead of the hardware's."""
    devices: int | None = None
    """Devices of a node; by default the config's trainer.devices, or the hardware's 8 if that names no number."""
    nodes: int | None = None
    """By default the config's trainer.num_nodes."""
    sp: int | None = None
    """Ranks that share a sequence; by default the config's strategy's, or 1."""
    frames: int | None = None
    """Frames of a video; by default data.video.max_frames."""
    frame_size: str = "1280x720"
    """Width x height of the videos, before the family's rule."""
    text_tokens: int = 512
    """Tokens of a prompt beside its video."""
    prompt_tokens: int | None = None
    """All tokens of a prompt; its media tokens stay."""
    utilisation: float = 0.4
    """Share of the peak FLOP/s reached."""
    bandwidth_utilisation: float = 0.6
    """Share of the bandwidth of memory and networks reached."""
    launch_us: float = 7.0
    """Microseconds from one kernel that Python launches to the next."""
    workspace_gib: float = 3.0
    """Memory of CUDA, NCCL, cuBLAS and gaps."""
    json: Path | None = None
    """Write the plan to this file as well."""

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("devices", "nodes", "sp", "frames", "prompt_tokens"), COUNT)
        check_ranges(self, "--", **counts, memory_gib=(1e-3, 1e6), text_tokens=NOT_NEGATIVE)
        check_ranges(self, "--", utilisation=(1e-6, 1), bandwidth_utilisation=(1e-6, 1), workspace_gib=NOT_NEGATIVE)
        check_ranges(self, "--", launch_us=NOT_NEGATIVE)


@dataclass(frozen=True)
class PlannedRun:
    """The parts of a run that decide what it needs; no weights are loaded."""

    model: PolicyModule
    data: LongVideoReason
    strategy: Any
    """The config's strategy: an `MRSPStrategy`, or what the plan puts one in place of."""
    precision: str
    num_nodes: int = 1
    num_devices: int | None = None
    """Devices of a node; None if the config leaves that to the machine."""
    rollout: Any = None
    """The `RolloutCallback`, of which sampling and engine count; None for a run without training rollouts."""


@dataclass(frozen=True)
class PlanGridRow:
    """Need of one number of nodes with one degree of sequence parallelism."""

    nodes: int
    sp: int
    need_gib: float
    fits: bool
    step_s: float
    prompts: int
    """Prompts of a step, over all sequence-parallel groups."""


@dataclass(frozen=True)
class PlanReport:
    """All that is known of a run before it starts; `--json` writes these fields."""

    command: str
    model: str
    hardware: Hardware
    plan: Plan
    bytes_per_device: dict[str, MemoryParts]
    host_bytes_per_node: MemoryParts
    peak_phase: str
    fits: bool
    verdict: str
    notes: list[str]
    operations: dict[str, float]
    times_s: dict[str, float]
    largest_frames: int
    grid: list[PlanGridRow]


def plan_run(run: PlannedRun, options: PlanOptions, command: str) -> PlanReport:
    """Plans a run.

    Args:
        run: its parts.
        options: hardware, and what is to be different from the config.
        command: that asked for it, for the result.
    """
    node = find_hardware(options.hardware, options.memory_gib, options.devices)
    machine = replace(node, devices=options.devices or run.num_devices or node.devices)
    family = shapes.find_config(run.model.family)
    plan, notes, with_frames = plan_from_run(run, machine, options)
    if plan.max_tokens_per_micro_batch > run.model.max_tokens_per_micro_batch:
        budget = f"model.max_tokens_per_micro_batch={plan.max_tokens_per_micro_batch}"
        notes += [f"a prompt and its completions need {budget}: planned with it"]
    limit = run.data.renderer.max_prompt_tokens
    if limit is not None and plan.prompt_tokens > limit:
        notes += [f"data.max_prompt_tokens={limit} would skip prompts of {plan.prompt_tokens} tokens; raise it"]
    efficiency = flops.Efficiency(options.utilisation, options.bandwidth_utilisation, options.launch_us * 1e-6)
    loading = run.data.loader_options
    estimate = memory.estimate_memory(plan)
    verdict = memory.fit_verdict(plan, machine.memory_bytes, with_frames)
    return PlanReport(
        command=command,
        model=family.model_path,
        hardware=machine,
        plan=plan,
        bytes_per_device=estimate.phases,
        host_bytes_per_node=memory.host_memory(plan, loading.prefetch_prompts if loading.num_workers else 0),
        peak_phase=estimate.peak_phase,
        fits=verdict.fits,
        verdict=verdict.text,
        notes=[*notes, *head_notes(plan), *environment_notes(plan), *teacher_notes(plan)],
        operations=flops.step_flops(plan),
        times_s=flops.step_times(plan, machine, efficiency),
        largest_frames=memory.largest_frames(plan, machine.memory_bytes, with_frames) if with_frames else 0,
        grid=plan_grid(plan, node, efficiency),
    )


def verdict_before_start(run: PlannedRun, num_devices: int, available_bytes: float) -> memory.FitVerdict:
    """Says whether a run that is about to start fits its devices, with its longest video and prompt.

    Args:
        run: its parts.
        num_devices: of a node.
        available_bytes: of a device.
    """
    options = PlanOptions()
    machine = find_hardware(options.hardware, available_bytes / GIB, num_devices)
    plan, _, with_frames = plan_from_run(run, machine, options)
    return memory.fit_verdict(plan, available_bytes, with_frames)


def plan_from_run(
    run: PlannedRun, machine: Hardware, options: PlanOptions
) -> tuple[Plan, list[str], memory.FramesRule | None]:
    """The run as its config describes it, on the nodes of the options, with a budget for its longest prompt.

    Returns:
        The run, notes on what differs from the config, and for videos the rule for other numbers of frames.
    """
    model, data, strategy, family = run.model, run.data, run.strategy, run.model.family
    notes: list[str] = []
    if not isinstance(strategy, MRSPStrategy):
        strategy = MRSPStrategy()
        notes.append("the config has another strategy: planned for longrl.strategies.mr_sp.MRSPStrategy")
    devices = (options.nodes or run.num_nodes) * machine.devices
    sp_group = sp_group_size_of(options.sp or strategy.sequence_parallel_size, machine.devices, devices)
    check_sizes(devices, sp_group, strategy.num_replicas)
    is_rl = data.renderer.stage == "rl"
    has_pairs = data.renderer.stage == "preference"
    sampling = SamplingParams(num_generations=2 if has_pairs else 1)
    if is_rl and run.rollout:
        sampling = run.rollout.sampling
    engine = run.rollout.engine if run.rollout else HFEngine()
    resample_rounds = run.rollout.max_resample_rounds if run.rollout else 0
    environment = run.rollout.environment if is_rl and run.rollout else None
    observed = environment.max_observed_tokens if environment else 0
    if run.rollout:
        run.rollout.fit_lengths(data.renderer.max_prompt_tokens)
    by_name: dict[str, Any] = {}
    for part in (family, strategy, engine):
        by_name |= {name: getattr(part, name) for name in NAMED_ALIKE if hasattr(part, name)}
    weight_bytes = getattr(torch, family.dtype).itemsize
    compute = strategy.sharding.compute_dtype
    video = data.renderer.video
    sizes = ModelSizes.from_family(family)
    plan = Plan(
        sizes,
        devices=devices,
        devices_per_node=machine.devices,
        sequence_parallel_size=sp_group,
        sp_group_size=sp_group,
        weight_bytes=weight_bytes,
        gathered_bytes=weight_bytes if compute is None else getattr(torch, compute).itemsize,
        autocast=run.precision == "bf16-mixed",
        offload=strategy.sharding.offload,
        optimizer_offload=model.optimizer_settings.offload,
        moment_bytes=None if model.optimizer_settings.kind == "adamw" else MOMENT_BYTES,
        pairs=has_pairs,
        reference=model.preference.needs_reference if has_pairs else is_rl and model.rollouts_need_reference,
        moving_reference=model.algorithm.moving_reference is not None,
        statistics_passes=statistics_passes(model.algorithm) if is_rl else 0,
        teachers=teachers.planned_teachers(model.distiller, compute),
        fp32_lm_head=model.algorithm.fp32_lm_head,
        prompts_per_batch=data.prompts_per_batch,
        eval_prompts=data.eval_prompts_per_batch,
        resamples=is_rl and model.algorithm.select is not keep_all and resample_rounds > 0,
        prompt_tokens=options.prompt_tokens or data.renderer.max_prompt_tokens or options.text_tokens,
        frames=(options.frames or video.num_frames or video.max_frames) if sizes.vision_encoder else 0,
        num_generations=sampling.num_generations,
        completion_tokens=sampling.max_completion_tokens + observed,
        observed_tokens=observed,
        max_tokens_per_micro_batch=model.max_tokens_per_micro_batch,
        mini_batches=model.mini_batches_per_rollout if is_rl else 1,
        epochs=model.epochs_per_rollout if is_rl else 1,
        vllm=vllm_share(engine, family, machine.memory_bytes),
        generates_elsewhere=engine.is_remote,
        bucket_bytes=engine.bucket_mib << 20 if isinstance(engine, VLLMEngine | VLLMServerEngine) else 0,
        feature_cache_bytes=model.features.max_bytes,
        workspace_bytes=int(options.workspace_gib * GIB),
        **by_name,
    )
    if strategy.sequence_parallel_size == "auto" and not options.sp:
        # As `PolicyModule` chooses: the smallest degree whose budget holds the longest sequence.
        length = plan.prompt_tokens + plan.num_generations * plan.completion_tokens
        holds_all = [
            sp for sp in range(1, sp_group) if sp_group % sp == 0 and sp * model.max_tokens_per_micro_batch >= length
        ]
        plan = replace(plan, sequence_parallel_size=min(holds_all, default=sp_group))
    if not plan.frames:
        return with_needed_budget(plan), notes, None
    with_frames = frames_rule(family, options, video.fps or 1.0)
    return with_frames(plan, plan.frames), notes, with_frames


def vllm_share(engine: RolloutEngine, family: CausalFamily, device_bytes: float) -> VLLMShare | None:
    """What vLLM takes of the trainer's devices; None if the engine is another."""
    if not isinstance(engine, VLLMEngine):
        return None
    return VLLMShare(
        device_bytes=device_bytes,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_bytes=None if engine.kv_cache_gib is None else engine.kv_cache_gib * GIB,
        max_model_len=engine.max_model_len,
        media_enter_whole=family.media_enter_whole,
        max_num_seqs=engine.max_num_seqs,
        enforce_eager=engine.enforce_eager,
        sleeps=engine.sleeps,
        ranks=engine.tensor_parallel_size,
    )


def frames_rule(family: CausalFamily, options: PlanOptions, fps: float) -> memory.FramesRule:
    """The same run with another number of frames: tokens follow from frames by the family's own pixel rule.

    Args:
        family: counts them.
        options: pixels of a frame, and what was given instead.
        fps: frames of a second of video, by which a track is as long as its video.
    """
    width, height = map(int, options.frame_size.split("x"))

    def with_frames(plan: Plan, frames: int) -> Plan:
        item = video_outline(family, frames, height, width)
        encoder = plan.sizes.vision_encoder
        media_tokens = family.num_features(item)
        sound_tokens = family.sound_tokens(frames / fps)
        time_tokens = family.time_tokens(item.timestamps)
        sized = replace(
            plan,
            frames=frames,
            media_tokens=media_tokens,
            sound_tokens=sound_tokens,
            sound_together=family.sound_tokens_per_encode(),
            spatial_patches=item.grid_thw[1] * item.grid_thw[2],
            encoded_together=family.temporal_patches_per_encode(item),
            encoded_patches=family.encoded_patches(item),
            cell_patches=family.encoded_patches(item.part(1)),
            pooled_frames=item.temporal_patch_size // encoder.frames_per_patch if encoder else 1,
            prompt_tokens=options.prompt_tokens or media_tokens + sound_tokens + time_tokens + options.text_tokens,
        )
        return with_needed_budget(sized)

    return with_frames


def video_outline(family: CausalFamily, num_frames: int, height: int, width: int) -> Media:
    """A video of frames of `height` x `width`, one a second, without its patches."""
    no_pixels = torch.zeros(0, 3, height, width, dtype=torch.uint8)
    times = tuple(float(second) for second in range(num_frames))
    return family.outline_media(Frames("video", no_pixels, times, "plan", float(num_frames)))


def with_needed_budget(plan: Plan) -> Plan:
    """The same run with a budget that holds a prompt and its completions, at least."""
    budget = max(plan.max_tokens_per_micro_batch, needed_budget(plan))
    return replace(plan, max_tokens_per_micro_batch=budget)


def head_notes(plan: Plan) -> list[str]:
    """Says that any number of heads goes with any number of ranks, and what it costs."""
    heads, sp, sizes = plan.heads, plan.sequence_parallel_size, plan.sizes
    if sp == 1:
        return []
    num_heads = sp * heads.per_rank * heads.size
    notes = [
        f"{sizes.num_heads} query and {sizes.num_key_heads} key heads on {sp} ranks work: {heads.per_rank} part(s) of "
        f"{heads.size} queries with their key head per rank; {num_heads - sizes.num_heads} of {num_heads} query heads "
        "are padding"
    ]
    if sizes.delta_nets:
        parts, num_values = plan.delta_heads, sizes.delta_nets.num_heads
        padded = sp * parts.per_rank * parts.size
        notes.append(
            f"{num_values} value heads of gated delta nets: {parts.per_rank} part(s) of {parts.size} per rank; "
            f"{padded - num_values} of {padded} are padding"
        )
    return notes


def environment_notes(plan: Plan) -> list[str]:
    """Says what completions are taken to be shown."""
    if not plan.observed_tokens:
        return []
    media = ", all of them features of crops that no other completion asks for" if plan.crop_tokens else ""
    return [
        f"rollout.environment: every completion is planned with all {plan.observed_tokens} tokens of "
        f"max_observed_tokens{media}; seconds of tools and of waiting for them are not counted"
    ]


def teacher_notes(plan: Plan) -> list[str]:
    """Says what teachers are taken to read."""
    if not plan.teachers:
        return []
    return ["model.teacher: planned with the policy's prompts; what data.teacher_view shows beside is not counted"]


def shared_by(vllm: VLLMShare | None, sp: int) -> VLLMShare | None:
    """The same vLLM over ranks that share prompts: no more of them than `sp`."""
    return vllm and replace(vllm, ranks=math.gcd(vllm.ranks, sp))


def plan_grid(plan: Plan, machine: Hardware, efficiency: flops.Efficiency) -> list[PlanGridRow]:
    """The run on 1 to 128 nodes, with every degree of sequence parallelism."""
    rows = []
    for nodes in NODES:
        devices = nodes * machine.devices
        for sp in DEGREES:
            if devices % sp or devices % plan.num_replicas:
                continue
            other = replace(plan, devices=devices, devices_per_node=machine.devices, sequence_parallel_size=sp)
            other = replace(other, sp_group_size=sp, vllm=shared_by(other.vllm, sp))
            other = with_needed_budget(other)
            need = memory.estimate_memory(other).peak
            fits = memory.missing_memory(other, machine.memory_bytes) == 0
            seconds = flops.step_times(other, machine, efficiency)["step"]
            prompts = devices // sp * other.prompts_per_batch
            rows.append(PlanGridRow(nodes, sp, need / GIB, fits, seconds, prompts))
    return rows
