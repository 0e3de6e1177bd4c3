"""Draws docs/figures/rollout_memory.svg from what `python -m longrl plan` computes for the recipe below.

From the repository's root, after the plan has changed:

    python docs/figures/rollout_memory.py
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrl.commands.main import main

RECIPE = "configs/qwen2_5_vl_7b_longvideo_grpo_lora.yaml"
OPTIONS = ["--config", RECIPE, "--hardware", "H100", "--devices", "1"]
TARGET = Path(__file__).with_suffix(".svg")
GIB = 1 << 30

INK, GREY = "#1f2430", "#5b6270"
KINDS = {
    "policy: weights, encoder, adapters' moments": ("#4477aa", ("weights", "vision encoder", "optimizer", "reference")),
    "CUDA and gaps (assumed)": ("#a9b2c0", ("workspace",)),
    "features of the step's videos": ("#228866", ("features", "vLLM's features")),
    "vLLM": ("#d09b2c", ("vLLM",)),
    "the phase's own: activations, gradients, logits": ("#cc6677", ()),
}
"""What a colour stands for -> colour, and the plan's names; the last one has all other names."""
PHASES = {
    "encode": ("encode",),
    "sync": (),
    "generate": ("prefill", "decode"),
    "score": ("score",),
    "update": ("update",),
}
"""Phase of the plan's memory, in the order of a step -> its times in the plan. Of a sync the plan has none."""
NARROWEST = 60
"""Width of a bar that would be narrower."""
DRAWN_WIDER = ("encode", "sync")

WIDTH, HEIGHT = 760, 520
LEFT, RIGHT, TOP, BOTTOM = 62, 744, 44, 320
"""Edges of the plot."""


def planned() -> dict[str, Any]:
    """The plan of the recipe, as `--json` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        main(["plan", *OPTIONS, "--json", str(file)])
        content: dict[str, Any] = json.loads(file.read_text())
    return content


def stacked(parts: Mapping[str, float]) -> dict[str, float]:
    """Bytes of a phase by kind -> GiB by what a colour stands for."""
    named = [name for _, names in KINDS.values() for name in names]
    found = {}
    for kind, (_, names) in KINDS.items():
        wanted = names or [name for name in parts if name not in named]
        found[kind] = sum(parts.get(name, 0.0) for name in wanted) / GIB
    return found


def text(x: float, y: float, words: str, *, size: int = 14, fill: str = INK, anchor: str = "middle") -> str:
    """A line of text in the figure."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}">{words}</text>'


def draw(plan: Mapping[str, Any]) -> str:
    """The figure: a bar for each phase, as high as its memory and, but for `DRAWN_WIDER`, as wide as its time."""
    capacity = plan["hardware"]["memory_gib"]
    times = {phase: sum(plan["times_s"][name] for name in names) for phase, names in PHASES.items()}
    longest = sum(seconds for phase, seconds in times.items() if phase not in DRAWN_WIDER)
    per_second = (RIGHT - LEFT - NARROWEST * len(DRAWN_WIDER)) / longest
    per_gib = (BOTTOM - TOP) / (capacity + 4)

    lines = []
    for level in range(0, int(capacity) + 1, 20):  # GiB, at the left
        y = BOTTOM - level * per_gib
        lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}" stroke="#e1e5eb"/>')
        lines.append(text(LEFT - 8, y + 5, f"{level}", fill=GREY, anchor="end"))
    y = BOTTOM - capacity * per_gib
    lines.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{RIGHT}" y2="{y:.1f}" stroke="{INK}" stroke-dasharray="6 4"/>')
    lines.append(text(RIGHT, y - 7, f"the GPU has {capacity:.1f} GiB", anchor="end"))

    x = float(LEFT)
    for phase, seconds in times.items():
        width = NARROWEST if phase in DRAWN_WIDER else seconds * per_second
        y = float(BOTTOM)
        parts = stacked(plan["bytes_per_device"][phase])
        for kind, size in parts.items():
            height = size * per_gib
            y -= height
            colour = KINDS[kind][0]
            lines.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{height:.1f}" fill="{colour}"/>'
            )
        middle = x + width / 2
        lines.append(text(middle, y - 7, f"{sum(parts.values()):.0f}", size=15))
        lines.append(text(middle, BOTTOM + 21, phase, size=15))
        lines.append(text(middle, BOTTOM + 40, f"{seconds:.0f} s" if seconds else "-", fill=GREY))
        x += width

    for number, (kind, (colour, _)) in enumerate(reversed(KINDS.items())):
        y = BOTTOM + 62 + 22 * number
        lines.append(f'<rect x="{LEFT}" y="{y}" width="16" height="16" rx="3" fill="{colour}"/>')
        lines.append(text(LEFT + 26, y + 13, kind, anchor="start"))
    total = plan["times_s"]["step"]
    note = f"Width is time, {total:.0f} s in all; encode is drawn wider, and for sync the plan has no time."
    lines.append(text(LEFT, BOTTOM + 62 + 22 * len(KINDS) + 16, note, fill=GREY, anchor="start"))
    label = "Memory of one GPU over a step, planned from the recipe"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    font = "font-family=\"Helvetica, Arial, 'DejaVu Sans', sans-serif\""
    return "\n".join(
        [
            f'{head} {font} role="img" aria-label="{label}">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>',
            text(16, 26, "GiB", fill=GREY, anchor="start"),
            *lines,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    TARGET.write_text(draw(planned()))
