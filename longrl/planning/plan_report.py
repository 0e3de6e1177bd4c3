"""From a config to a plan, and from a plan to tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longrl.datamodules.longvideo_reason import LongVideoReason
from longrl.engines.hf import HFEngine
from longrl.models.base import CausalFamily
from longrl.modules.eight_bit import MOMENT_BYTES
from longrl.modules.policy import PolicyModule
from longrl.planning import flops, formulas, memory, shapes
from longrl.planning.hardware import Hardware, hardware
from longrl.planning.host import host
from longrl.planning.inputs import Plan, Sizes, micro_batch, needed_budget
from longrl.strategies.mr_sp import MRSPStrategy, check_sizes, sp_group_size_of
from longrl.types import Frames, Media, SamplingParams

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
DEGREES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class PlanOptions:
    """What is planned beside the run's own config."""

    hardware: str = "H100"
    """A100, H100 or H200: nodes of 8."""
    memory_gib: float | None = None
    """Memory of a device, instead of the hardware's."""
    devices: int | None = None
    """Devices of a node, instead of the hardware's 8."""
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
    workspace_gib: float = 3.0
    """Memory of CUDA, NCCL, cuBLAS and gaps."""
    json: Path | None = None
    """Write the plan to this file as well."""


@dataclass(frozen=True)
class PlannedRun:
    """The parts of a run that decide what it needs; no weights are loaded."""

    model: PolicyModule
    data: LongVideoReason
    strategy: Any
    """The config's strategy: an `MRSPStrategy`, or what the plan puts one in place of."""
    precision: str
    num_nodes: int = 1
    sampling: SamplingParams | None = None
    """Of training rollouts; None without any."""
    engine: Any = None
    """Generates the rollouts."""


@dataclass(frozen=True)
class GridRow:
    """One choice of nodes and degree."""

    nodes: int
    sp: int
    need_gib: float
    fits: bool
    step_s: float
    prompts: int
    """Of a step, over all teams."""


@dataclass(frozen=True)
class Result:
    """All that is shown."""

    command: str
    model: str
    hardware: Hardware
    plan: Plan
    estimate: memory.Estimate
    verdict: memory.Verdict
    host: formulas.Parts
    notes: tuple[str, ...]
    operations: dict[str, float]
    times: flops.Times
    largest_frames: int
    grid: tuple[GridRow, ...]


def plan_run(run: PlannedRun, options: PlanOptions, command: str) -> Result:
    """Plans a run.

    Args:
        run: its parts.
        options: hardware, and what is to be different from the config.
        command: that asked for it, for the result.
    """
    machine = hardware(options.hardware, options.memory_gib, options.devices)
    family = shapes.find(run.model.family)
    given, notes = plan_of(run, family, machine, options)
    with_frames = frames_rule(family, options)
    plan = with_frames(given, given.frames) if given.media_tokens or given.frames else budgeted(given)
    if plan.max_tokens_per_micro_batch > run.model.max_tokens_per_micro_batch:
        budget = f"model.max_tokens_per_micro_batch={plan.max_tokens_per_micro_batch}"
        notes += [f"a prompt and its completions need {budget}: planned with it"]
    limit = run.data.renderer.max_prompt_tokens
    if limit is not None and plan.prompt_tokens > limit:
        notes += [f"data.max_prompt_tokens={limit} would skip prompts of {plan.prompt_tokens} tokens; raise it"]
    efficiency = flops.Efficiency(options.utilisation, options.bandwidth_utilisation)
    loading = run.data.loader_options
    prefetched = loading.prefetch_prompts if loading.num_workers else 0
    usual = with_frames if plan.frames else None
    return Result(
        command=command,
        model=family.model_path,
        hardware=machine,
        plan=plan,
        estimate=memory.estimate(plan),
        verdict=memory.verdict(plan, machine.memory_bytes, usual),
        host=host(plan, prefetched),
        notes=(*notes, *head_notes(plan)),
        operations=flops.step_flops(plan),
        times=flops.times(plan, machine, efficiency),
        largest_frames=memory.largest_frames(plan, machine.memory_bytes, usual) if usual else 0,
        grid=tuple(grid(plan, machine, efficiency)),
    )


def verdict_before_start(run: PlannedRun, num_devices: int, available_bytes: float) -> memory.Verdict:
    """Says whether a run that is about to start fits its devices, with its longest video and prompt.

    Args:
        run: its parts.
        num_devices: of a node.
        available_bytes: of a device.
    """
    options = PlanOptions()
    machine = hardware(options.hardware, available_bytes / memory.GIB, num_devices)
    family = run.model.family
    plan, _ = plan_of(run, family, machine, options)
    with_frames = frames_rule(family, options)
    plan = with_frames(plan, plan.frames) if plan.frames else budgeted(plan)
    return memory.verdict(plan, available_bytes, with_frames if plan.frames else None)


def plan_of(run: PlannedRun, family: CausalFamily, machine: Hardware, options: PlanOptions) -> tuple[Plan, list[str]]:
    """The run as its config describes it, on the nodes asked for, and what differs from the config."""
    model, data, strategy, notes = run.model, run.data, run.strategy, []
    if not isinstance(strategy, MRSPStrategy):
        strategy = MRSPStrategy()
        notes.append("the config has another strategy: planned for longrl.strategies.mr_sp.MRSPStrategy")
    devices = (options.nodes or run.num_nodes) * machine.devices
    sp_group = sp_group_size_of(options.sp or strategy.sequence_parallel_size, machine.devices, devices)
    check_sizes(devices, sp_group, strategy.num_replicas)
    rl = data.renderer.stage == "rl"
    sampling = run.sampling if rl and run.sampling else SamplingParams(num_generations=1)
    engine = run.engine or HFEngine()
    weight_bytes = getattr(torch, family.dtype).itemsize
    compute = strategy.sharding.compute_dtype
    video = data.renderer.video
    sizes = Sizes.of(family)
    plan = Plan(
        sizes,
        devices=devices,
        devices_per_node=machine.devices,
        sequence_parallel_size=sp_group,
        sp_group_size=sp_group,
        num_replicas=strategy.num_replicas,
        weight_bytes=weight_bytes,
        gathered_bytes=weight_bytes if compute is None else getattr(torch, compute).itemsize,
        autocast=run.precision in ("bf16-mixed", "16-mixed"),
        offload=strategy.sharding.offload,
        gradient_checkpointing=family.gradient_checkpointing,
        offload_checkpoints=family.offload_checkpoints,
        mlp_chunk_tokens=family.mlp_chunk_tokens,
        optimizer_offload=model.optimizer_settings.offload,
        moment_bytes=None if model.optimizer_settings.kind == "adamw" else MOMENT_BYTES,
        reference=rl and model.algorithm.kl_coef > 0,
        prompts_per_batch=data.prompts_per_batch,
        prompt_tokens=options.prompt_tokens or data.renderer.max_prompt_tokens or options.text_tokens,
        frames=(options.frames or video.num_frames or video.max_frames) if sizes.vision_encoder else 0,
        num_generations=sampling.num_generations,
        completion_tokens=sampling.max_completion_tokens,
        max_tokens_per_micro_batch=model.max_tokens_per_micro_batch,
        mini_batches=model.mini_batches_per_rollout if rl else 1,
        epochs=model.epochs_per_rollout if rl else 1,
        max_sequences=getattr(engine, "max_sequences", 256),
        prefill_chunk_tokens=getattr(engine, "prefill_chunk_tokens", 16_384),
        feature_cache_bytes=model.features.max_bytes,
        num_gather_chunks=strategy.num_gather_chunks,
        workspace_bytes=int(options.workspace_gib * memory.GIB),
    )
    if strategy.sequence_parallel_size == "auto" and not options.sp:
        plan = dataclasses.replace(plan, sequence_parallel_size=chosen_degree(plan))
    return plan, notes


def chosen_degree(plan: Plan) -> int:
    """What `Parallel.sequence_for` chooses: the smallest degree whose budget holds the longest sequence."""
    length = plan.prompt_tokens + plan.num_generations * plan.completion_tokens
    degrees = [degree for degree in range(1, plan.sp_group + 1) if plan.sp_group % degree == 0]
    return next((degree for degree in degrees if degree * plan.max_tokens_per_micro_batch >= length), plan.sp_group)


def frames_rule(family: CausalFamily, options: PlanOptions) -> memory.WithFrames:
    """Tokens follow from frames by the family's own pixel rule, asked about a black video."""
    width, height = map(int, options.frame_size.split("x"))

    def with_frames(plan: Plan, frames: int) -> Plan:
        item = black_video(family, frames, height, width)
        tokens, cell_patches = family.num_features(item), item.grid_thw[1] * item.grid_thw[2]
        times = family.time_tokens(range(0, frames, item.temporal_patch_size))
        pooled = item.temporal_patch_size // family.config.vision_config.temporal_patch_size
        prompt = options.prompt_tokens or tokens + times + options.text_tokens
        sized = dataclasses.replace(
            plan,
            frames=frames,
            media_tokens=tokens,
            cell_patches=cell_patches,
            prompt_tokens=prompt,
            pooled_frames=pooled,
        )
        return budgeted(sized)

    return with_frames


def black_video(family: CausalFamily, frames: int, height: int, width: int) -> Media:
    """A video of so many frames of `height` x `width`, without its patches."""
    black = torch.zeros(0, 3, height, width, dtype=torch.uint8)
    return family.outline_media(Frames("video", black, tuple(map(float, range(frames))), "plan", float(frames)))


def budgeted(plan: Plan) -> Plan:
    """The run with a budget that holds a prompt and its completions, at least."""
    budget = max(plan.max_tokens_per_micro_batch, needed_budget(plan))
    return dataclasses.replace(plan, max_tokens_per_micro_batch=budget)


def head_notes(plan: Plan) -> list[str]:
    """That any number of heads goes with any number of ranks, and what it costs."""
    heads, sp, sizes = plan.heads, plan.sequence_parallel_size, plan.sizes
    if sp == 1:
        return []
    made = sp * heads.per_rank * heads.size
    return [
        f"{sizes.num_heads} query and {sizes.num_key_heads} key heads on {sp} ranks work: {heads.per_rank} part(s) of "
        f"{heads.size} queries with their key head per rank; {made - sizes.num_heads} of {made} query heads are padding"
    ]


def grid(plan: Plan, machine: Hardware, efficiency: flops.Efficiency) -> list[GridRow]:
    """1 to 128 nodes times the degrees of sequence parallelism."""
    rows = []
    for nodes in NODES:
        devices = nodes * machine.devices
        for sp in (degree for degree in DEGREES if devices % degree == 0 and devices % plan.num_replicas == 0):
            other = budgeted(dataclasses.replace(plan, devices=devices, sequence_parallel_size=sp, sp_group_size=sp))
            need, seconds = memory.estimate(other).peak, flops.times(other, machine, efficiency).step
            prompts = devices // sp * other.prompts_per_batch
            rows.append(GridRow(nodes, sp, need / memory.GIB, need <= machine.memory_bytes, seconds, prompts))
    return rows


# ------------------------------------------------------------------------------------------------------------- tables


def show(result: Result) -> None:
    """Prints the plan."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # rich would squeeze tables into 80 columns
        console = Console(width=150)
    say: Callable[[str], None] = lambda text: console.print(text, soft_wrap=True, highlight=False)  # noqa: E731
    plan, batch = result.plan, micro_batch(result.plan)
    say(
        f"{result.model} on {plan.devices} x {result.hardware.name}, sequence_parallel_size "
        f"{plan.sequence_parallel_size}: {plan.frames} frames, prompt of {plan.prompt_tokens} tokens, "
        f"{plan.num_generations} completions of {plan.completion_tokens}, {plan.prompts_per_batch} prompts per team; "
        f"micro-batch of {batch.tokens} tokens on {plan.sequence_parallel_size} ranks"
    )
    console.print(phase_table(result))
    console.print(time_table(result))
    console.print(grid_table(result))
    say("host memory of a node in GiB: " + ", ".join(f"{k} {v / memory.GIB:.1f}" for k, v in result.host.items()))
    for note in result.notes:
        say(f"note: {note}")
    if plan.frames:
        more = " and more: the family shrinks them" if result.largest_frames == memory.MAX_FRAMES else ""
        say(f"longest video that fits: {result.largest_frames} frames{more}")
    say(result.verdict.text)


def phase_table(result: Result) -> Any:
    """GiB of a device by kind and phase."""
    from rich.table import Table

    phases = result.estimate.phases
    kinds = list(dict.fromkeys(kind for parts in phases.values() for kind, size in parts.items() if size))
    table = Table("GiB per device", *phases, title="memory")
    for kind in kinds:
        table.add_row(kind, *(f"{parts.get(kind, 0) / memory.GIB:.2f}" for parts in phases.values()))
    table.add_row("all", *(f"{result.estimate.total(phase) / memory.GIB:.2f}" for phase in phases))
    return table


def time_table(result: Result) -> Any:
    """Operations of a team and seconds of a step by phase."""
    from rich.table import Table

    table = Table("", *result.operations, "step", title="time, at the stated share of the peaks")
    seconds = [getattr(result.times, phase) for phase in result.operations]
    work = [*result.operations.values(), sum(result.operations.values())]
    table.add_row("PFLOP of a team", *(f"{value / 1e15:.1f}" for value in work))
    table.add_row("s", *(f"{value:.1f}" for value in [*seconds, result.times.step]))
    return table


def grid_table(result: Result) -> Any:
    """Nodes down, degrees across: seconds of a step if it fits, else what it needs."""
    from rich.table import Table

    degrees = sorted({row.sp for row in result.grid})
    table = Table(
        "nodes", *(f"sp {sp}" for sp in degrees), title="GiB needed; seconds per step (per prompt) if it fits"
    )
    for nodes in sorted({row.nodes for row in result.grid}):
        rows = {row.sp: row for row in result.grid if row.nodes == nodes}
        table.add_row(str(nodes), *(_cell(rows[sp]) if sp in rows else "" for sp in degrees))
    return table


def _cell(row: GridRow) -> str:
    need = f"{row.need_gib:.0f} GiB"
    return f"{need}: {row.step_s:.0f} s ({row.step_s / row.prompts:.1f})" if row.fits else f"{need} -"
