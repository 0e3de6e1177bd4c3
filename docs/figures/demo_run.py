"""The picture of the README: what `make demo` left, in one figure.

Run it by `.venv/bin/python docs/figures/demo_run.py runs/demo docs/figures/demo_run.png`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpec

from longrl.datamodules.rows.question_rows import longvideo_reason_row, make_rows
from longrl.datamodules.rows.sources import media_root_of, read_records
from longrl.evaluation.benchmark_report import sample_card
from longrl.evaluation.curves import find_metrics, read_metrics
from longrl.evaluation.samples import TEST_FOLDER, read_samples

RUNS = {"base": ("base model", "#bdbdbd"), "sft": ("after SFT", "#7fb3d5"), "rl": ("after GRPO", "#1f618d"),
        "blind": ("after GRPO, without the video", "#f0b27a")}  # fmt: skip
CATEGORIES = ("overall", "temporal", "spatial", "goal and purpose", "plot and narrative")
WINDOW = 10
"""Steps of the moving average."""
NUM_FRAMES = 8


def main(run: str, out: str) -> None:
    """Draws the run's curve, its accuracies, and one held-out question that GRPO learned to answer."""
    folder = Path(run)
    figure = plt.figure(figsize=(12, 6.4))
    grid = GridSpec(
        2, NUM_FRAMES, figure=figure, height_ratios=(2.6, 1), left=0.05, right=0.98, top=0.94, bottom=0.13, hspace=0.45
    )
    draw_rewards(figure.add_subplot(grid[0, :3]), folder / "rl")
    draw_accuracies(figure.add_subplot(grid[0, 3:]), json.loads((folder / "results.json").read_text()))
    draw_answer([figure.add_subplot(grid[1, column]) for column in range(NUM_FRAMES)], folder)
    figure.savefig(out, dpi=100, pil_kwargs={"optimize": True})


def draw_rewards(axes: Axes, run: Path) -> None:
    """Mean reward of each step's completions, and its moving average."""
    series = read_metrics(find_metrics(run))["reward/mean"]
    steps = [step + 1 for step in series]
    rewards = [*series.values()]
    smooth = [statistics.fmean(rewards[max(0, end - WINDOW) : end]) for end in range(1, len(rewards) + 1)]
    axes.plot(steps, rewards, color="#aed6f1", linewidth=1)
    axes.plot(steps, smooth, color="#1f618d", linewidth=2)
    axes.set(title="reward during GRPO", xlabel="optimizer step", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)


def draw_accuracies(axes: Axes, results: dict[str, Any]) -> None:
    """Accuracy by category and model, with 95% intervals."""
    width = 0.8 / len(RUNS)
    for place, (name, (label, color)) in enumerate(RUNS.items()):
        scores = [results[name][category] for category in CATEGORIES]
        heights = [100 * score["accuracy"] for score in scores]
        below = [100 * (score["accuracy"] - score["low"]) for score in scores]
        above = [100 * (score["high"] - score["accuracy"]) for score in scores]
        x = [group + (place - 1.5) * width for group in range(len(CATEGORIES))]
        axes.bar(x, heights, width, label=label, color=color)
        axes.errorbar(x, heights, [below, above], fmt="none", ecolor="#444444", elinewidth=1, capsize=2)
    axes.axhline(25, color="#888888", linestyle=":", linewidth=1)
    axes.text(0.62, 26, "chance", color="#666666", fontsize=9)
    axes.set_xticks(range(len(CATEGORIES)), [name.replace(" and ", "\nand ") for name in CATEGORIES])
    axes.set(title="held-out questions answered right, %", ylim=(0, 105))
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def draw_answer(columns: list[Axes], folder: Path) -> None:
    """Frames of one video, its question, and what was answered before and after GRPO."""
    source = str(folder / "data" / "eval.jsonl")
    rows = make_rows(read_records(source), longvideo_reason_row, media_root_of(source))
    samples = {run: samples_of(folder, run) for run in ("sft", "rl")}
    for index, row in enumerate(rows):
        lines = {run: by_question[index] for run, by_question in samples.items()}
        if row.category == "plot and narrative" and is_right(lines["rl"]) and not is_right(lines["sft"]):
            break
    card = sample_card(row, lines)
    chosen = [round(place * (len(card.frames) - 1) / (NUM_FRAMES - 1)) for place in range(NUM_FRAMES)]
    for axes, place in zip(columns, chosen, strict=True):
        axes.imshow(card.frames[place])
        axes.set_title(f"{card.timestamps[place]:.0f} s", fontsize=9)
        axes.axis("off")
    question = " ".join(row.problem.split("\n"))
    answers = [f"{label}: {text_of(lines[run])}" for run, label in (("sft", "after SFT"), ("rl", "after GRPO"))]
    text = "\n".join([question, "      ".join(answers)])
    columns[0].text(0, -0.15, text, transform=columns[0].transAxes, va="top", fontsize=10, linespacing=1.6)


def samples_of(folder: Path, run: str) -> dict[int, Any]:
    """Number of a question -> its line of `samples.jsonl`."""
    (lines,) = read_samples(folder / "evaluation" / run / TEST_FOLDER).values()
    return {line["doc_id"]: line for line in lines}


def is_right(line: Any) -> bool:
    """Whether the question was answered right."""
    return line["correct"][0]


def text_of(line: Any) -> str:
    """What stands in the answer's tags."""
    return line["filtered_resps"][0]


if __name__ == "__main__":
    main(*sys.argv[1:])
