"""The data set's card: what is in it, how it was made, and what an idle model would score."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from longrl.pipeline.config import PipelineConfig

Rows = dict[str, list[dict[str, Any]]]
TEMPLATE = Path(__file__).with_name("dataset_card.txt")
# The hub's names for the sizes of data sets, each with the number of rows that is too many for it.
SIZES = {"n<1K": 1000, "1K<n<10K": 10_000, "10K<n<100K": 100_000}


def dataset_card(rows: Rows, config: PipelineConfig) -> str:
    """README.md of the data set, with the header that the hub and `datasets` read."""
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split, part in rows.items() if part)
    total = sum(map(len, rows.values()))
    size = next((name for name, limit in SIZES.items() if total < limit), "100K<n<1M")
    roles = ("captioner", "writer", "policy", "judge")
    used = [(role, getattr(config, role)) for role in roles if getattr(config, role) is not None]
    models = "".join(f"| {role} | `{endpoint.model}` |\n" for role, endpoint in used)
    options = config.filter
    rule = "Questions were not filtered by difficulty."
    if options.num_samples:
        rule = (
            f"Kept are questions that the policy answered right at least once and wrong at least once in "
            f"{options.num_samples} answers,\nand in at most {options.max_blind_share:.0%} of {options.blind_samples} "
            "answers without the video."
        )
    return TEMPLATE.read_text(encoding="utf-8").format(
        license=config.export.license, size=size, files=files, name=config.export.name, models=models, rule=rule,
        splits=_split_rows(rows), categories=_category_table(rows)
    )  # fmt: skip


def _split_rows(rows: Rows) -> str:
    lines = []
    for split, part in rows.items():
        durations = {row["metadata"]["video_sha256"]: row["metadata"]["duration_s"] for row in part}
        hours = f"{sum(durations.values()) / 3600:.2f}"
        letters = Counter(row["answer"] for row in part if row["task"] == "multiple_choice")
        num_choices = letters.total()
        best = f"{100 * max(letters.values()) / num_choices:.1f} %" if num_choices else ""
        cells = (split, len(part), len(durations), hours, num_choices, len(part) - num_choices, best)
        lines.append(f"| {' | '.join(map(str, cells))} |\n")
    return "".join(lines)


def _category_table(rows: Rows) -> str:
    lines = ["| category | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    counts = [Counter(row["problem_type"] for row in part) for part in rows.values()]
    for category in sorted(set().union(*counts)):
        lines.append(f"| {category} | " + " | ".join(str(count[category]) for count in counts) + " |")
    return "\n".join(lines)
