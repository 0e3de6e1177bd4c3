"""Step export: questions as the data set that `LongVideoReason` loads, split by video, with a card."""

from __future__ import annotations

import filecmp
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from random import Random

from longrl.io.atomic import atomic_folder, atomic_write, set_aside
from longrl.io.jsonl import write_jsonl
from longrl.pipeline.config import ExportOptions
from longrl.pipeline.dataset_card import dataset_card
from longrl.pipeline.step_run import Record, StepRun
from longrl.rewards.options import DEFAULT_LETTERS, with_options

logger = logging.getLogger(__name__)

SPLITS = ("sft", "rl", "eval")
VIDEOS = PurePosixPath("videos")


def export_dataset(run: StepRun) -> None:
    """Writes `dataset/`: JSONL and parquet of each split, README.md, and hard links to the videos.

    The folder is replaced as a whole; one that holds something else is kept under another name.
    """
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
    with atomic_folder(folder) as work:
        shown = sorted({record["video"] for part in by_split.values() for record in part})
        paths = {name: link_video(videos[name], work, folder) for name in shown}
        rows: dict[str, list[Record]] = {}
        for split, part in by_split.items():
            letters = _deal_letters(part, split, options)
            rows[split] = [
                _row(record, letters.get(record["id"]), videos[record["video"]], paths[record["video"]])
                for record in part
            ]
            report.counts[f"{split}: questions"] = len(part)
            report.counts[f"{split}: videos"] = len({record["video"] for record in part})
        for split, part in rows.items():
            write_jsonl(work / f"{split}.jsonl", part)
            if part:
                _write_parquet(work / f"{split}.parquet", part)
        write_jsonl(work / "unused.jsonl", unused)
        atomic_write(work / "README.md", dataset_card(rows, run.config))
        if folder.is_dir() and not _has_same_files(folder, work):
            logger.warning("%s is another data set now; the earlier one is %s", folder, set_aside(folder).name)
    outside = sum(not path.startswith(f"{VIDEOS}/") for path in paths.values())
    if outside:
        report.counts["videos that cannot be linked"] = outside
        logger.warning(
            "%d videos cannot be linked into %s (another disk, or not yours): to train on them copy them to it, or set "
            "data.allow_outside_paths=true",
            outside,
            folder / VIDEOS,
        )
    for _ in records:
        run.finish_item()
    report.items, report.done = len(records), len(records) - len(unused)
    report.counts["unused, without reasoning"] = len(unused)


def link_video(video: Record, work: Path, folder: Path) -> str:
    """Path of a video in the data set, whose rows may name nothing outside its folder when a run reads them.

    A hard link takes no space. Where there can be none the video stays where it is.

    Args:
        video: with name, path and digest.
        work: the folder while it is made.
        folder: that it becomes.
    """
    name = PurePosixPath(video["video"])
    if name.is_absolute() or ".." in name.parts or name.parts[0] == "~":
        name = PurePosixPath(video["digest"][:16], name.name)
    link = work / VIDEOS / name
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(os.path.realpath(video["path"]), link)
    except OSError:
        return Path(os.path.relpath(video["path"], folder)).as_posix()
    return str(VIDEOS / name)


def _has_same_files(first: Path, second: Path) -> bool:
    names = {path.name for folder in (first, second) for path in folder.iterdir() if path.is_file()}
    _, changed, absent = filecmp.cmpfiles(first, second, names, shallow=False)
    return not changed and not absent


def assign_splits(names: Sequence[str], videos: dict[str, Record], options: ExportOptions) -> dict[str, str]:
    """Video -> split, decided by seed and content: a video stays where it is when others come, but for the borders."""
    draws = {name: hashlib.sha256(f"{options.seed}/{videos[name]['digest']}".encode()).hexdigest() for name in names}
    order = sorted(names, key=draws.__getitem__)
    num_eval = max(1, round(options.eval_share * len(order))) if options.eval_share and len(order) > 1 else 0
    num_rest = len(order) - num_eval
    num_sft = max(1, round(options.sft_share * num_rest)) if options.sft_share and num_rest else 0
    splits = ["eval"] * num_eval + ["sft"] * num_sft + ["rl"] * (num_rest - num_sft)
    return dict(zip(order, splits, strict=True))


def _deal_letters(records: Sequence[Record], split: str, options: ExportOptions) -> dict[str, str]:
    """Id -> letter of the right option, dealt out evenly in a split and in each of its categories."""
    by_category: dict[tuple[str, int], list[str]] = {}
    for record in records:
        if record["options"]:
            by_category.setdefault((record["category"], len(record["options"])), []).append(record["id"])
    dealt: dict[str, str] = {}
    for (category, count), ids in sorted(by_category.items()):
        # A category goes on where the one before ended, else all would have more of the first letters.
        letters = [DEFAULT_LETTERS[(len(dealt) + i) % count] for i in range(len(ids))]
        Random(f"{options.seed}/{split}/{category}/{count}").shuffle(letters)
        dealt |= dict(zip(ids, letters, strict=True))
    return dealt


def _row(record: Record, letter: str | None, video: Record, path: str) -> Record:
    """One record in the published schema."""
    problem, answer = record["question"], record["answer"]
    if letter is not None:
        shuffled = [option for option in record["options"] if option != answer]
        Random(record["id"]).shuffle(shuffled)
        shuffled.insert(DEFAULT_LETTERS.index(letter), answer)
        problem, answer = with_options(problem, shuffled), letter
    return {
        "problem_id": record["id"],
        "problem": problem,
        "data_type": "video",
        "problem_type": record["category"],
        "reasoning": record["reasoning"],
        "videos": path,
        "answer": f"<answer>{answer}</answer>",
        "task": record["kind"],
        "metadata": {
            "duration_s": video["duration_s"],
            **{name: record[name] for name in ("steps", "box", "box_at_s")},
            "policy_right": record["seen"]["mean"],
            "policy_samples": record["seen"]["samples"],
            "blind_right": record["blind"]["mean"],
            "video_sha256": video["digest"],
        },
    }


def _write_parquet(path: Path, rows: list[Record]) -> None:
    """Writes rows as a parquet file whose columns have the same types in every split."""
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
    schema = pa.schema([*((name, text) for name in rows[0] if name != "metadata"), ("metadata", metadata)])
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), path)
