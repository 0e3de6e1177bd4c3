"""A plan as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from longrl.planning.hardware import GIB
from longrl.planning.inputs import micro_batch
from longrl.planning.memory import MAX_FRAMES
from longrl.planning.run_plan import PlanGridRow, PlanReport


def show_plan(report: PlanReport) -> None:
    """Prints a plan."""
    console = Console()
    if not console.is_terminal:  # rich would squeeze tables into 80 columns
        console = Console(width=150)
    plan, batch = report.plan, micro_batch(report.plan)
    head = (
        f"{report.model} on {plan.devices} x {report.hardware.name}, sequence_parallel_size "
        f"{plan.sequence_parallel_size}: {plan.frames} frames, prompt of {plan.prompt_tokens} tokens, "
        f"{plan.num_generations} completions of {plan.completion_tokens}, {plan.prompts_per_batch} prompts per group; "
        f"micro-batch of {batch.tokens} tokens on {plan.sequence_parallel_size} ranks"
    )
    host = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in report.host.items())
    lines = [f"host memory of a node in GiB: {host}", *(f"note: {note}" for note in report.notes)]
    if plan.frames:
        more = " and more: the family shrinks them" if report.largest_frames == MAX_FRAMES else ""
        lines.append(f"longest video that fits: {report.largest_frames} frames{more}")
    console.print(head, soft_wrap=True, highlight=False)
    for table in (phase_table(report), time_table(report), grid_table(report)):
        console.print(table)
    console.print("\n".join([*lines, report.verdict.text]), soft_wrap=True, highlight=False)


def phase_table(report: PlanReport) -> Table:
    """GiB of a device by kind and phase."""
    phases = report.estimate.phases
    kinds = list(dict.fromkeys(kind for parts in phases.values() for kind, size in parts.items() if size))
    table = Table("GiB per device", *phases, title="memory")
    for kind in kinds:
        table.add_row(kind, *(f"{parts.get(kind, 0) / GIB:.2f}" for parts in phases.values()))
    table.add_row("all", *(f"{report.estimate.total(phase) / GIB:.2f}" for phase in phases))
    return table


def time_table(report: PlanReport) -> Table:
    """Operations of a sequence-parallel group and seconds of a step by phase."""
    table = Table("", *report.operations, "step", title="time, at the stated share of the peaks")
    seconds = [getattr(report.times, phase) for phase in report.operations]
    work = [*report.operations.values(), sum(report.operations.values())]
    table.add_row("PFLOP of a group", *(f"{value / 1e15:.1f}" for value in work))
    table.add_row("s", *(f"{value:.1f}" for value in [*seconds, report.times.step]))
    return table


def grid_table(report: PlanReport) -> Table:
    """Nodes down, degrees across: seconds of a step if it fits, else what it needs."""
    degrees = sorted({row.sp for row in report.grid})
    table = Table(
        "nodes", *(f"sp {sp}" for sp in degrees), title="GiB needed; seconds per step (per prompt) if it fits"
    )
    for nodes in sorted({row.nodes for row in report.grid}):
        rows = {row.sp: row for row in report.grid if row.nodes == nodes}
        table.add_row(str(nodes), *(_grid_text(rows[sp]) if sp in rows else "" for sp in degrees))
    return table


def _grid_text(row: PlanGridRow) -> str:
    need = f"{row.need_gib:.0f} GiB"
    return f"{need}: {row.step_s:.0f} s ({row.step_s / row.prompts:.1f})" if row.fits else f"{need} -"
