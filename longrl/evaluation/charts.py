"""The chart of accuracies and the encoding of images for a page that stands alone."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longrl.evaluation.curves import decorate

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

RUN_COLORS: dict[str, str] = {
    "blind": "#d5dae0",
    "no video": "#d5dae0",
    "video": "#e07a3f",
    "base": "#9aa7b4",
    "sft": "#4d82bc",
    "rl": "#e07a3f",
}
_OTHER_COLORS = ("#3a9d7c", "#9466b8", "#c4527a", "#c9a227", "#4d82bc", "#7a5c3e", "#5fb0b7", "#39434d")

Scores = Mapping[str, Mapping[str, Any]]
"""Category -> {"accuracy", "low", "high", "n"}."""


def run_color(name: str, position: int = 0) -> str:
    """A run's colour in charts and on the page."""
    return RUN_COLORS.get(name.lower(), _OTHER_COLORS[position % len(_OTHER_COLORS)])


def run_label(name: str) -> str:
    """A run's name as readers know it; unknown names stay as they are."""
    return {"base": "Base", "sft": "SFT", "rl": "RL", "blind": "No video"}.get(name, name)


def plot_accuracies(scores: Mapping[str, Scores], chance: float | None = None) -> Figure:
    """Grouped bars: per category one bar and its 95% interval for each run.

    Args:
        scores: run -> category -> score; "overall" comes first.
        chance: accuracy of a baseline, drawn as a dashed line.
    """
    from matplotlib.figure import Figure

    categories = all_categories(scores)
    width = 0.8 / max(len(scores), 1)
    size = (max(5.0, 1.1 + 0.36 * len(scores) * len(categories) + 0.5 * len(categories)), 3.4)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for position, (run, by_category) in enumerate(scores.items()):
        found = [(place, by_category[name]) for place, name in enumerate(categories) if name in by_category]
        centers = [place + width * (position - (len(scores) - 1) / 2) for place, _ in found]
        heights = [100 * score["accuracy"] for _, score in found]
        axes.bar(centers, heights, 0.88 * width, color=run_color(run, position), label=run_label(run))
        below = [100 * (score["accuracy"] - score["low"]) for _, score in found]
        above = [100 * (score["high"] - score["accuracy"]) for _, score in found]
        axes.errorbar(centers, heights, [below, above], fmt="none", ecolor="#39434d", elinewidth=1, capsize=2.5)
    if chance is not None:
        axes.axhline(
            100 * chance, color="#6b7681", linewidth=1, linestyle=(0, (4, 3)), label="majority answer", zorder=0
        )
    decorate(axes, "Accuracy with 95% intervals", "%")
    axes.set_xticks(range(len(categories)), [name.replace(" and ", "\nand ") for name in categories], fontsize=8.5)
    axes.set_ylim(0, 105)
    figure.legend(loc="outside upper right", ncols=len(scores) + 1, fontsize=8, frameon=False)
    return figure


def plot_sweep(
    points: Mapping[int, Mapping[str, Any]], chance: float | None = None, blind: Mapping[str, Any] | None = None
) -> Figure:
    """Accuracy and its 95% interval against the number of frames, on a scale of powers of two.

    Args:
        points: frames -> {"accuracy", "low", "high"}.
        chance: accuracy of always giving the most frequent answer, a dashed line.
        blind: score without video, a line with its interval.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    frames = sorted(points)
    heights = [100 * points[count]["accuracy"] for count in frames]
    below = [100 * (points[count]["accuracy"] - points[count]["low"]) for count in frames]
    above = [100 * (points[count]["high"] - points[count]["accuracy"]) for count in frames]
    axes.errorbar(
        frames, heights, [below, above], color=RUN_COLORS["rl"], ecolor="#39434d", elinewidth=1, capsize=3, marker="o",
        linewidth=1.8, markersize=5, label="with video",
    )  # fmt: skip
    if blind is not None:
        axes.axhline(100 * blind["accuracy"], color=RUN_COLORS["base"], linewidth=1.4, label="no video", zorder=0)
        axes.axhspan(100 * blind["low"], 100 * blind["high"], color=RUN_COLORS["blind"], alpha=0.5, zorder=0)
    if chance is not None:
        axes.axhline(100 * chance, color="#6b7681", linewidth=1, linestyle=(0, (4, 3)), label="majority answer")
    decorate(axes, "Accuracy with 95% intervals against frames", "%")
    axes.set_xscale("log", base=2)
    axes.set_xticks(frames, [str(count) for count in frames])
    axes.minorticks_off()
    axes.set_xlabel("frames", fontsize=8, color="#5b6773")
    axes.margins(x=0.06, y=0.15)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure


def all_categories(scores: Mapping[str, Scores]) -> list[str]:
    """Categories of all runs, "overall" first, then in the order of their first appearance."""
    names = list(dict.fromkeys(name for by_category in scores.values() for name in by_category))
    return sorted(names, key=lambda name: name != "overall")


def figure_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def png_width(png: bytes) -> int:
    """Width in pixels, from the file's header."""
    return int.from_bytes(png[16:20], "big")


def frame_jpeg(frame: np.ndarray, height: int = 180) -> bytes:
    """A frame [H, W, 3] uint8 as the bytes of a JPEG file, made smaller when it is higher than `height`."""
    from PIL import Image

    image = Image.fromarray(frame)
    if image.height > height:
        image = image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return buffer.getvalue()


def data_uri(image: bytes, kind: str) -> str:
    """Image bytes as the `src` of an <img>, so that the page needs no other file; kind is "png", "jpeg" or "webp"."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
