"""The last steps of a run as two lanes drawn to scale: what the trainer did, and how busy the engine was."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no global state, works in any thread
from matplotlib.patches import Patch

from longrl.evaluation.curves import decorate
from longrl.evaluation.timeline import WAITS, StepTimeline

LAST_STEPS = 8
"""That are drawn."""
PHASE_COLORS = {
    "data": "#b8c1ca",
    "encode": "#5fb0b7",
    "sync": "#c4527a",
    WAITS: "#f1e3c6",
    "reward": "#c9a227",
    "teacher": "#8e6bbf",
    "update": "#2f6db3",
    "save": "#7a5c3e",
}
"""In the order of the legend."""
OTHER = "#dfe4e9"
"""Of the trainer's time between its phases."""
ENGINE = "#3a9d7c"
TRAINER_LANE, ENGINE_LANE = (1.15, 1.0), (0.0, 1.0)
"""Bottom and height."""


def plot_timeline(steps: Sequence[StepTimeline], last: int = LAST_STEPS) -> Figure | None:
    """The last steps behind one another on one axis of seconds; None of none.

    The engine's lane is as high as requests are under way, its top the most of all steps drawn; where they are not
    counted, it is full.
    """
    shown = steps[-last:]
    if not shown:
        return None
    figure = Figure(figsize=(12.3, 2.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    counted = [step for step in shown if step.is_counted]
    most = max((requests for step in counted for _, _, requests in step.engine), default=1.0) or 1.0
    start = 0.0
    for step in shown:
        _draw_step(axes, step, start, most)
        start += step.seconds
    decorate(axes, "Last steps", "seconds")
    axes.grid(visible=False)
    axes.set_xlim(0, start)
    axes.set_ylim(-0.02, 2.5)
    engine = f"engine, up to\n{most:.0f} requests" if counted else "engine"
    axes.set_yticks([0.5, 1.65], [engine, "trainer"])
    figure.legend(handles=_handles(shown), loc="outside upper right", ncols=9, fontsize=8, frameon=False)
    return figure


def _draw_step(axes: Axes, step: StepTimeline, start: float, most: float) -> None:
    """Both lanes of a step, and its number above its start."""
    end = start + step.seconds
    axes.broken_barh([(start, step.seconds)], TRAINER_LANE, facecolors=OTHER, linewidth=0)
    for phase, first, last in step.trainer:
        color = PHASE_COLORS.get(phase, OTHER)
        axes.broken_barh([(start + first, last - first)], TRAINER_LANE, facecolors=color, linewidth=0)
    for first, last, requests in step.engine:
        height = ENGINE_LANE[1] * requests / most if step.is_counted else ENGINE_LANE[1]
        axes.broken_barh([(start + first, last - first)], (ENGINE_LANE[0], height), facecolors=ENGINE, linewidth=0)
    axes.plot([end, end], [-0.02, 2.2], color="#39434d", linewidth=0.7)
    axes.text(start + step.seconds / 2, 2.22, f"step {step.step}", fontsize=7.5, color="#5b6773", ha="center")


def _handles(steps: Sequence[StepTimeline]) -> list[Patch]:
    drawn = {phase for step in steps for phase, _, _ in step.trainer}
    names = {WAITS: "generate (waits)"}
    handles = [Patch(color=color, label=names.get(name, name)) for name, color in PHASE_COLORS.items() if name in drawn]
    return [*handles, Patch(color=OTHER, label="other"), Patch(color=ENGINE, label="engine busy")]
