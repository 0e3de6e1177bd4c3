"""A plan as tables on the terminal."""

from __future__ import annotations

from rich.console import Console

from longrl.io.tables import make_table
from longrl.planning.hardware import GIB
from longrl.planning.memory import MAX_FRAMES
from longrl.planning.micro_batches import micro_batch
from longrl.planning.run_plan import PlanGridRow, PlanReport


def show_plan(report: PlanReport) -> None:
    """Prints a plan."""
    console = Console()
    if not console.is_terminal:  # rich would squeeze tables into 80 columns
        console = Console(width=150)
    plan, batch = report.plan, micro_batch(report.plan)
    shown = f" ({plan.observed_tokens} of them shown)" if plan.observed_tokens else ""
    head = (
        f"{report.model} on {plan.devices} x {report.hardware.name}, sequence_parallel_size "
        f"{plan.sequence_parallel_size}: {plan.frames} frames, prompt of {plan.prompt_tokens} tokens, "
        f"{plan.num_generations} completions of {plan.completion_tokens}{shown}, {plan.prompts_per_batch} prompts per "
        f"sequence-parallel group; micro-batch of {batch.tokens} tokens on {plan.sequence_parallel_size} ranks"
    )
    host = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in report.host_bytes_per_node.items())
    lines = [f"host memory of a node in GiB: {host}", *(f"note: {note}" for note in report.notes)]
    if plan.frames:
        more = " and more: the family shrinks them" if report.largest_frames == MAX_FRAMES else ""
        lines.append(f"longest video that fits: {report.largest_frames} frames{more}")
    console.print(head, soft_wrap=True, highlight=False)
    phases = report.bytes_per_device
    kinds = dict.fromkeys(kind for parts in phases.values() for kind, size in parts.items() if size)
    by_kind = {kind: [parts.get(kind, 0) for parts in phases.values()] for kind in kinds}
    by_kind["all"] = [sum(parts.values()) for parts in phases.values()]
    rows = [[kind, *(f"{size / GIB:.2f}" for size in sizes)] for kind, sizes in by_kind.items()]
    console.print(make_table(["GiB per device", *phases], rows, title="memory"))
    work = [*report.operations.values(), sum(report.operations.values())]
    rows = [
        ["PFLOP of a sequence-parallel group", *(f"{value / 1e15:.1f}" for value in work)],
        ["s", *(f"{value:.1f}" for value in report.times_s.values())],
    ]
    console.print(make_table(["", *report.times_s], rows, title="time, at the stated share of the peaks"))
    # Nodes down, degrees across: seconds of a step if it fits, else what it needs.
    degrees = sorted({row.sp for row in report.grid})
    texts = {(row.nodes, row.sp): _grid_text(row) for row in report.grid}
    nodes = sorted({row.nodes for row in report.grid})
    rows = [[str(count), *(texts.get((count, sp), "") for sp in degrees)] for count in nodes]
    title = "GiB needed; seconds per step (per prompt) if it fits"
    console.print(make_table(["nodes", *(f"sp {sp}" for sp in degrees)], rows, title=title))
    console.print("\n".join([*lines, report.verdict]), soft_wrap=True, highlight=False)


def _grid_text(row: PlanGridRow) -> str:
    need = f"{row.need_gib:.0f} GiB"
    return f"{need}: {row.step_s:.0f} s ({row.step_s / row.prompts:.1f})" if row.fits else f"{need} -"
