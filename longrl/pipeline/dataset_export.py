"""Step export: questions as the data set that `LongVideoReason` loads, split by video, with a card."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random

from longrl.io.atomic import atomic_write
from longrl.io.jsonl import write_jsonl
from longrl.pipeline.card import dataset_card
from longrl.pipeline.config import ExportOptions, PipelineConfig
from longrl.pipeline.difficulty import LETTERS, with_options
from longrl.pipeline.step_run import Record, StepRun

SPLITS = ("sft", "rl", "eval")


def export_dataset(run: StepRun) -> None:
    """Writes `dataset/`: JSONL and parquet of each split, and README.md. The folder is replaced as a whole."""
    records, options, report = run.workspace.read("filter"), run.config.export, run.report
    videos = {video["video"]: video for video in run.workspace.read("timeline")}
    run.add_items(len(records))
    split_of = assign_splits(sorted({record["video"] for record in records}), videos, options)
    by_split: dict[str, list[Record]] = {split: [] for split in SPLITS}
    unused = []
    for record in records:
        split = split_of[record["video"]]
        if split == "sft" and record["reasoning"] is None:
            unused.append({**record, "why": "its video is one of the SFT videos, but it has no reasoning"})
        else:
            by_split[split].append(record)
    folder = run.workspace.path("dataset")
    rows = {
        split: [_row(each, letter, videos[each["video"]], folder) for each, letter in _dealt(kept, split, options)]
        for split, kept in by_split.items()
    }
    _write(folder, rows, unused, run.config)
    for _ in records:
        run.finish_item()
    report.items, report.done = len(records), len(records) - len(unused)
    for split, of_split in rows.items():
        report.counts[f"{split}: questions"] = len(of_split)
        report.counts[f"{split}: videos"] = len({row["videos"] for row in of_split})
    report.counts["unused, without reasoning"] = len(unused)


def assign_splits(names: Sequence[str], videos: dict[str, Record], options: ExportOptions) -> dict[str, str]:
    """Video -> split, decided by seed and content: a video stays where it is when others come, but for the borders."""
    order = sorted(
        names, key=lambda name: hashlib.sha256(f"{options.seed}/{videos[name]['digest']}".encode()).hexdigest()
    )
    num_eval = max(1, round(options.eval_share * len(order))) if options.eval_share and len(order) > 1 else 0
    num_sft = round(options.sft_share * (len(order) - num_eval))
    if not num_sft and options.sft_share and len(order) > num_eval:
        num_sft = 1
    splits = ["eval"] * num_eval + ["sft"] * num_sft + ["rl"] * (len(order) - num_eval - num_sft)
    return dict(zip(order, splits, strict=True))


def _dealt(records: Sequence[Record], split: str, options: ExportOptions) -> list[tuple[Record, str | None]]:
    """Each question with the letter of its right option, dealt out evenly in a split and in each of its categories."""
    dealt: dict[str, str] = {}
    by_category: dict[tuple[str, int], list[str]] = {}
    for record in records:
        if record["options"]:
            by_category.setdefault((record["category"], len(record["options"])), []).append(record["id"])
    used = 0  # a category goes on where the one before ended, else all would have more of the first letters
    for (category, count), ids in sorted(by_category.items()):
        letters = [LETTERS[(used + i) % count] for i in range(len(ids))]
        used += len(ids)
        Random(f"{options.seed}/{split}/{category}/{count}").shuffle(letters)
        dealt |= dict(zip(ids, letters, strict=True))
    return [(record, dealt.get(record["id"])) for record in records]


def _row(record: Record, letter: str | None, video: Record, folder: Path) -> Record:
    """One record in the published schema."""
    problem, answer = record["question"], record["answer"]
    if letter is not None:
        wrong = [option for option in record["options"] if option != answer]
        Random(record["id"]).shuffle(wrong)
        wrong.insert(LETTERS.index(letter), answer)
        problem, answer = with_options(problem, wrong), letter
    return {
        "problem_id": record["id"],
        "problem": problem,
        "data_type": "video",
        "problem_type": record["category"],
        "reasoning": record["reasoning"],
        "videos": _relative(video["path"], folder),
        "answer": f"<answer>{answer}</answer>",
        "task": record["kind"],
        "metadata": {
            "duration_s": video["duration_s"],
            "steps": record["steps"],
            "box": record["box"],
            "box_at_s": record["box_at_s"],
            "policy_right": record["seen"]["mean"],
            "policy_samples": record["seen"]["samples"],
            "blind_right": record["blind"]["mean"],
            "video_sha256": video["digest"],
        },
    }


def _relative(path: str, folder: Path) -> str:
    return Path(os.path.relpath(os.path.abspath(path), os.path.abspath(folder))).as_posix()


# ---- writing ----


def _write(folder: Path, rows: dict[str, list[Record]], unused: list[Record], config: PipelineConfig) -> None:
    """All files in a folder beside, which then takes the place of the old one."""
    work = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for split, of_split in rows.items():
        write_jsonl(work / f"{split}.jsonl", of_split)
        if of_split:
            atomic_write(work / f"{split}.parquet", parquet_bytes(of_split))
    write_jsonl(work / "unused.jsonl", unused)
    atomic_write(work / "README.md", dataset_card(rows, config))
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    work.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def parquet_bytes(rows: Sequence[Record]) -> bytes:
    """Rows as a parquet file whose columns have the same types in every split."""
    import pyarrow as pa
    from pyarrow import parquet

    text, number = pa.string(), pa.float64()
    step = pa.struct([("start_s", number), ("end_s", number), ("text", text)])
    metadata = pa.struct(
        [
            ("duration_s", number), ("steps", pa.list_(step)), ("box", pa.list_(number)), ("box_at_s", number),
            ("policy_right", number), ("policy_samples", pa.int64()), ("blind_right", number), ("video_sha256", text),
        ]
    )  # fmt: skip
    names = ("problem_id", "problem", "data_type", "problem_type", "reasoning", "videos", "answer", "task")
    schema = pa.schema([*((name, text) for name in names), ("metadata", metadata)])
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), buffer)
    return buffer.getvalue()
