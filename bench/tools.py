"""Does a model learn when to look? Accuracy on needles after a cold start, after RL with tools and after RL without.

The videos show each answer for two seconds, between the frames that a prompt shows; `crop_video` shows a part of them
at a higher frame rate (longrl/testing/needles.py). All is done by longrl's own commands, which are printed:

- sft: a cold start on worked answers of a beginner who looks at the right scene in 2 of 5.
- rl: GRPO from there on, on answers alone.
- rl_no_tools: the same GRPO without an environment; a call is then the end of an answer.

Each answers held-out questions as it was trained, of which 1 in 4 is guessed. Then the time of a step with tools,
against steps of as many tokens without (tool_steps.py).

    python bench/tools.py --json bench/results/tools.json
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import Row, parse_arguments, report
from demo_runs import CONFIGS, overall_row, run, runs_folder, tested_scores
from tool_steps import step_rows

from longrl.datamodules.rows import longvideo_reason_row, read_rows
from longrl.evaluation.benchmark_report import cards
from longrl.evaluation.curves import find_metrics, read_metrics
from longrl.evaluation.report_page import Report, write_report
from longrl.evaluation.samples import SAMPLES_FILE, TEST_FOLDER, read_samples
from longrl.io.jsonl import read_jsonl
from longrl.testing.needles import NeedleConfig, write_needle_base, write_needles

NUM_CARDS = 6
NO_TOOLS = "--rollout.environment=null"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs all stages in a folder of its own; `--quick` takes few steps, to see that everything runs."""
    arguments = parse_arguments(__doc__ or "", argv)
    folder = runs_folder("tools", arguments.quick)
    config = NeedleConfig()
    steps: tuple[str, ...] = ()
    if arguments.quick:
        config = replace(config, num_train_videos=12, num_eval_videos=6)
        steps = ("--trainer.max_steps=2", "--data.prompts_per_batch=2")
    stages = Stages(folder, steps)
    write_needles(folder / "data", config)
    write_needle_base(CONFIGS / "base", folder / "base")

    stages.fit("sft", "sft.yaml", "traces", f"--model.init_from={folder / 'base'}", NO_TOOLS)
    stages.fit("rl", "grpo.yaml", "train", f"--model.init_from={folder / 'sft'}")
    stages.fit("rl_no_tools", "grpo.yaml", "train", f"--model.init_from={folder / 'sft'}", NO_TOOLS)
    rows = [stages.test("sft"), stages.test("rl"), stages.test("rl_no_tools", NO_TOOLS)]
    num_prompts, repeats = (2, 1) if arguments.quick else (8, 5)
    more = {"calls": calls_by_step(folder / "rl"), "steps": step_rows(folder, num_prompts, repeats)}
    report(__file__, arguments, rows, notes=[f"report: {stages.write_page()}"], more=more)
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
        self.scores: dict[str, Any] = {}
        self.common = [
            f"--config={CONFIGS / 'common.yaml'}",
            f"--config={CONFIGS / 'tools' / 'common.yaml'}",
            f"--model.family.init_args.model={folder / 'base'}",
            f"--data.test={folder / 'data' / 'eval.jsonl'}",
        ]

    def fit(self, name: str, config: str, data: str, *options: str) -> None:
        """Trains a stage on one of the data set's files."""
        start = time.perf_counter()
        train = f"--data.train={self.folder / 'data' / data}.jsonl"
        stage = f"--config={CONFIGS / 'tools' / config}"
        run("fit", *self.common, stage, f"--run_dir={self.folder / name}", train, *options, *self.steps)
        self.seconds[name] = time.perf_counter() - start

    def test(self, name: str, *options: str) -> Row:
        """Asks a stage's weights the held-out questions."""
        folder = self.folder / "evaluation" / name
        run("test", *self.common, f"--run_dir={folder}", f"--model.init_from={self.folder / name}", *options)
        self.scores[name] = tested_scores(folder)
        return {
            "stage": name,
            **overall_row(folder),
            "calls_per_answer": calls_per_answer(folder / TEST_FOLDER / SAMPLES_FILE),
            "seconds": round(self.seconds[name], 1),
        }

    def write_page(self) -> Path:
        """A page with the accuracies, the curves of training and some answers with the frames that they asked for."""
        rows = read_rows(self.folder / "data" / "eval.jsonl", longvideo_reason_row)
        lines = []
        for name in self.scores:
            (of_stage,) = read_samples(self.folder / "evaluation" / name / TEST_FOLDER).values()
            lines += [line | {"condition": name} for line in of_stage]
        page = Report(
            title="Looking closer",
            subtitle="A small model learns by GRPO when to look at a part of a video again.",
            results=self.scores,
            seconds=self.seconds,
            curves={name: find_metrics(self.folder / name) for name in self.scores},
            samples=cards(rows, lines, NUM_CARDS),
            chance=0.25,
        )
        return write_report(self.folder, page)


def calls_per_answer(samples: Path) -> float:
    """Mean number of calls in an answer."""
    answers = [turns for line in read_jsonl(samples) for turns in line.get("turns") or [[]]]
    calls = [sum(len(turn["calls"]) for turn in turns) for turns in answers]
    return round(statistics.fmean(calls), 3)


def calls_by_step(run: Path) -> list[Row]:
    """The curve of calls per answer of a run, and of its rewards."""
    metrics = read_metrics(find_metrics(run))
    calls = metrics["rollout/tool_calls"]
    rewards = metrics["reward/mean"]
    return [
        {"step": step, "calls_per_answer": round(calls[step], 3), "reward": round(rewards[step], 3)}
        for step in sorted(calls.keys() & rewards.keys())
    ]


if __name__ == "__main__":
    main()
