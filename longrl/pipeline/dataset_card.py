"""The data set's card: what is in it, how it was made, and what an idle model would score."""

from __future__ import annotations

from collections import Counter
from typing import Any

from longrl.pipeline.config import PipelineConfig

Rows = dict[str, list[dict[str, Any]]]


INTRO = """Questions about long videos with timestamped reasoning, made by `python -m longrl pipeline` in the schema of
LongVideo-Reason (arXiv:2507.07966). Questions and reasoning were written by models from captions; no person
has read them. No video occurs in two splits (videos are told apart by the hash of their content).
"""
FIELDS = """
| field | what |
|---|---|
| `problem_id` | video, category, kind and number |
| `problem` | the question, with its options behind letters |
| `data_type`, `problem_type`, `task` | `video`; the category; `multiple_choice` or `open_ended` |
| `reasoning` | one text for SFT; null where none was usable (then the row is not in `sft`) |
| `videos` | path, relative to this folder |
| `answer` | `<answer>B</answer>`, or the text of the answer |
| `metadata.steps` | the reasoning in steps with `start_s` and `end_s` in seconds of the video |
| `metadata.box`, `box_at_s` | corners in thousandths of width and height, and when it is seen, or null |
| `metadata.policy_right`, `policy_samples`, `blind_right` | how often the policy was right, and without video |
"""
# The hub's names for the sizes of data sets, each with the number of rows that is too many for it.
SIZES = {"n<1K": 1000, "1K<n<10K": 10_000, "10K<n<100K": 100_000}


def dataset_card(rows: Rows, config: PipelineConfig) -> str:
    """README.md of the data set, with the header that the hub and `datasets` read."""
    title = f"# {config.export.name}\n\n{INTRO}"
    return "\n".join([_header(rows, config), title, _table(rows), FIELDS, _origin(config)])


def _header(rows: Rows, config: PipelineConfig) -> str:
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split, part in rows.items() if part)
    total = sum(map(len, rows.values()))
    size = next((name for name, limit in SIZES.items() if total < limit), "100K<n<1M")
    return (
        f"---\nlicense: {config.export.license}\ntask_categories:\n- video-text-to-text\nsize_categories:\n- {size}\n"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n"
    )


def _table(rows: Rows) -> str:
    lines = [
        "| split | questions | videos | hours | multiple choice | open-ended | always the best letter |",
        "|---|---|---|---|---|---|---|",
    ]
    for split, part in rows.items():
        durations = {row["metadata"]["video_sha256"]: row["metadata"]["duration_s"] for row in part}
        hours = f"{sum(durations.values()) / 3600:.2f}"
        letters = Counter(row["answer"] for row in part if row["task"] == "multiple_choice")
        num_choices = letters.total()
        best = f"{100 * max(letters.values()) / num_choices:.1f} %" if num_choices else ""
        cells = (split, len(part), len(durations), hours, num_choices, len(part) - num_choices, best)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| category | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    counts = [Counter(row["problem_type"] for row in part) for part in rows.values()]
    for category in sorted(set().union(*counts)):
        lines.append(f"| {category} | " + " | ".join(str(count[category]) for count in counts) + " |")
    return "\n".join(lines) + "\n"


def _origin(config: PipelineConfig) -> str:
    roles = ("captioner", "writer", "policy", "judge")
    used = [(role, getattr(config, role)) for role in roles if getattr(config, role) is not None]
    models = "".join(f"| {role} | `{endpoint.model}` |\n" for role, endpoint in used)
    options = config.filter
    rule = (
        f"Kept are questions that the policy answered right at least once and wrong at least once in "
        f"{options.num_samples} answers,\nand in at most {options.max_blind_share:.0%} of {options.blind_samples} "
        "answers without the video."
        if options.num_samples
        else "Questions were not filtered by difficulty."
    )
    return f"## How it was made\n\n| role | model |\n|---|---|\n{models}\n{rule}\n"
