"""Records in a form of their own: a row function turns one into rows, for training, evaluation and scripts alike.

    python examples/custom_dataset.py

writes such a file and reads it. In a run:

    python -m longrl fit --config configs/demo/common.yaml --config examples/short_run.yaml \
        --data.train runs/examples/quiz.jsonl --data.row_function examples/custom_dataset.py:quiz_rows \
        --rollout.reward examples/custom_reward.yaml --run_dir runs/examples/dataset
"""

import json
from pathlib import Path

from longrl import Row, read_rows
from longrl.rewards.options import parse_options, with_options
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos

LETTERS = "ABCDEFGH"


def quiz_rows(record, index, media_root):
    """{clip, seen: [from, to], quiz: [[question, right wording, wrong wording, ...], ...]} as a row per question.

    Args:
        record: one line of the file, as JSON has it.
        index: its number, from 0 on, for messages and for ids.
        media_root: the folder of the file, where relative paths start.
    """
    if not record.get("quiz"):
        raise ValueError(f"record {index} needs 'quiz', a list of questions, got {record.get('quiz')!r}")
    rows = []
    for number, (question, right, *wrong) in enumerate(record["quiz"]):
        options = sorted([right, *wrong])  # the right one must not always stand first
        rows.append(
            Row(
                id=f"{index}-{number}",
                problem=with_options(question, options),
                answer=LETTERS[options.index(right)],
                videos=(str(Path(media_root or ".", record["clip"])),),
                metadata={"span_s": record["seen"]},  # show this part of the video alone, in seconds
            )
        )
    return rows


def write_quiz(folder="runs/examples", num_videos=64):
    """The questions of generated videos in that form: quiz.jsonl in the folder, which is returned."""
    videos = Path(folder, "videos")
    generate_videos(videos, SyntheticConfig(num_videos, num_eval_videos=0, fps=2))
    lines = []
    for row in read_rows(videos / "train.jsonl", "longrl.datamodules.rows.longvideo_reason_row"):
        options = parse_options(row.problem)
        right = options.pop(row.answer)
        question = row.problem.splitlines()[0]
        clip = Path(row.videos[0]).relative_to(folder)
        record = {"clip": str(clip), "seen": [0.0, 40.0], "quiz": [[question, right, *options.values()]]}
        lines.append(json.dumps(record))
    file = Path(folder, "quiz.jsonl")
    file.write_text("\n".join(lines) + "\n")
    return file


def main(**options):
    file = write_quiz(**options)
    rows = read_rows(file, quiz_rows)  # every row is checked: its answer is an option, its tags fit its media, ...
    print(f"{len(rows)} rows; the first:\n{rows[0].problem}\nanswer {rows[0].answer}, video {rows[0].videos[0]}")

    # A record that cannot be used is an error with its number; `data.bad_records: skip` has a run leave it out.
    file.with_name("broken.jsonl").write_text('{"clip": "videos/0.mp4", "quiz": []}\n')
    try:
        read_rows(file.with_name("broken.jsonl"), quiz_rows)
    except ValueError as error:
        print("error:", error)
    return rows


if __name__ == "__main__":
    main()
