"""Does a student learn faster from a teacher that sees more than from rewards? Accuracy and steps of both.

The demo's student (1.3 million weights) is taught the think/answer form by the demo's SFT stage. From that checkpoint
it goes on in two ways, with 256 completions per step:

- rl: the demo's GRPO on answers alone, 130 steps of 32 prompts and 8 completions of each.
- distil: reverse KL to a teacher on the student's own answers, a third of these steps, of 128 prompts and 2 completions
  of each. The teacher is as large as the student, but was taught worked answers about four times as many videos, then
  by 60 steps of GRPO, and sees twice the frames (`data.teacher_view`).

Both answer the held-out questions at the student's frames. All is done by longrl's own commands, which are printed.

    python bench/distil.py --json bench/results/distil.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from common import Row, parse_arguments, report
from demo_runs import CONFIGS, overall_row, run, runs_folder

from longrl.evaluation.curves import find_metrics, read_metrics

MORE_FRAMES = ("--data.video.fps=1.0", "--data.video.min_frames=4", "--data.video.max_frames=128")
"""What the teacher sees, as configs/demo/distil has it."""
PASSES = "train/teacher_passes_per_group"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs all stages in a folder of its own; `--quick` takes few steps, to see that everything runs."""
    arguments = parse_arguments(__doc__ or "", argv)
    folder = runs_folder("distil", arguments.quick)
    num_train, num_eval = 600, 100
    steps: tuple[str, ...] = ()
    if arguments.quick:
        num_train, num_eval = 12, 6
        steps = ("--trainer.max_steps=2", "--data.prompts_per_batch=2")
    stages = Stages(folder, steps)
    # Stories for evaluation are drawn first: they are the same in both, and in neither's training.
    for name, count in (("data", num_train), ("teacher_data", 4 * num_train)):
        counts = (f"--num_train_videos={count}", f"--num_eval_videos={num_eval}")
        run("synthetic", f"--out={folder / name}", *counts, "--fps=2")

    base, sft, teacher = CONFIGS / "base", folder / "sft", folder / "teacher"
    stages.fit("sft", "sft.yaml", f"--model.init_from={base}")
    stages.fit("teacher_sft", "distil/teacher.yaml", f"--model.init_from={base}", data="teacher_data")
    more = (*MORE_FRAMES, "--trainer.max_steps=60")
    stages.fit("teacher", "grpo.yaml", f"--model.init_from={folder / 'teacher_sft'}", *more, data="teacher_data")
    stages.fit("rl", "grpo.yaml", f"--model.init_from={sft}")
    taught_by = f"--model.teacher.init_args.init_from={teacher}"
    stages.fit("distil", "distil/student.yaml", f"--model.init_from={sft}", taught_by)

    before = [stages.test("sft"), *(stages.test(name, *MORE_FRAMES) for name in ("teacher_sft", "teacher"))]
    rows = [stages.test("rl"), stages.test("distil")]
    report(__file__, arguments, rows, more={"before": before})
    return rows


class Stages:
    """The runs of the bench.

    Args:
        folder: of all of them.
        steps: options that make training short.
    """

    def __init__(self, folder: Path, steps: Sequence[str]) -> None:
        self.folder = folder
        self.steps = steps
        self.seconds: dict[str, float] = {}

    def fit(self, name: str, config: str, *options: str, data: str = "data") -> None:
        """Trains a stage on the training questions of a folder."""
        start = time.perf_counter()
        configs = (f"--config={CONFIGS / 'common.yaml'}", f"--config={CONFIGS / config}")
        train = f"--data.train={self.folder / data / 'train.jsonl'}"
        run("fit", *configs, f"--run_dir={self.folder / name}", train, *options, *self.steps)
        self.seconds[name] = time.perf_counter() - start

    def test(self, name: str, *options: str) -> Row:
        """Asks a stage's weights the held-out questions."""
        folder = self.folder / "evaluation" / name
        test = f"--data.test={self.folder / 'data' / 'eval.jsonl'}"
        weights = f"--model.init_from={self.folder / name}"
        run("test", f"--config={CONFIGS / 'common.yaml'}", f"--run_dir={folder}", weights, test, *options)
        curves = read_metrics(find_metrics(self.folder / name))
        passes = curves.get(PASSES, {}).values()
        return {
            "method": name,
            "steps": len(curves["train/loss"]),
            "seconds": round(self.seconds[name], 1),
            **overall_row(folder),
            "teacher_passes_per_group": round(statistics.fmean(passes), 3) if passes else 0,
        }


if __name__ == "__main__":
    main()
