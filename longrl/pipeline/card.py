"""The data set's card: what is in it, how it was made, and what an idle model would score."""

from __future__ import annotations

from collections import Counter
from typing import Any

from longrl.pipeline.config import PipelineConfig

Rows = dict[str, list[dict[str, Any]]]


def dataset_card(rows: Rows, config: PipelineConfig) -> str:
    """README.md of the data set, with the header that the hub and `datasets` read."""
    return "\n".join([_header(rows, config), _intro(config), _table(rows), _fields(), _made(config)])


def _header(rows: Rows, config: PipelineConfig) -> str:
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split, of_split in rows.items() if of_split)
    total = sum(map(len, rows.values()))
    size = next(
        (name for limit, name in ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")) if total < limit),
        "100K<n<1M",
    )
    return (
        f"---\nlicense: {config.export.license}\ntask_categories:\n- video-text-to-text\nsize_categories:\n- {size}\n"
        f"configs:\n- config_name: default\n  data_files:\n{files}---\n"
    )


def _intro(config: PipelineConfig) -> str:
    return (
        f"# {config.export.name}\n\n"
        "Questions about long videos with timestamped reasoning, made by `python -m longrl pipeline` in the schema of\n"
        "LongVideo-Reason (arXiv:2507.07966). Questions and reasoning were written by models from captions; no person\n"
        "has read them. No video occurs in two splits (videos are told apart by the hash of their content).\n"
    )


def _table(rows: Rows) -> str:
    lines = [
        "| split | questions | videos | hours | multiple choice | open-ended | always the best letter |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {split} | {' | '.join(_counts(of_split))} |" for split, of_split in rows.items()]
    lines += ["", "| category | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    counts = {split: Counter(row["problem_type"] for row in of_split) for split, of_split in rows.items()}
    for category in sorted({name for of_split in counts.values() for name in of_split}):
        lines.append(f"| {category} | " + " | ".join(str(of_split[category]) for of_split in counts.values()) + " |")
    return "\n".join(lines) + "\n"


def _counts(rows: list[dict[str, Any]]) -> list[str]:
    durations = {row["metadata"]["video_sha256"]: row["metadata"]["duration_s"] for row in rows}
    letters = Counter(row["answer"] for row in rows if row["task"] == "multiple_choice")
    num_choices = letters.total()
    best = f"{100 * max(letters.values()) / num_choices:.1f} %" if num_choices else ""
    hours = f"{sum(durations.values()) / 3600:.2f}"
    return [str(len(rows)), str(len(durations)), hours, str(num_choices), str(len(rows) - num_choices), best]


def _fields() -> str:
    return """
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


def _made(config: PipelineConfig) -> str:
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
