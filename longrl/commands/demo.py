"""`python -m longrl demo`: data, SFT, RL and evaluation of a small vision-language model on one laptop, with a report.

Every stage is an ordinary command, printed before it runs, so that each can be run again by hand.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from longrl.callbacks.evaluation import print_scores
from longrl.commands.closing import without_next
from longrl.commands.main import main as run_command
from longrl.commands.parsers import ShortErrors
from longrl.datamodules.rows.question_rows import longvideo_reason_row, make_rows
from longrl.datamodules.rows.sources import media_root_of, read_records
from longrl.evaluation.benchmark_report import cards
from longrl.evaluation.curves import find_metrics
from longrl.evaluation.report_page import Report, SampleCard, write_report
from longrl.evaluation.result_files import write_json
from longrl.evaluation.samples import RESULTS_FILE, TEST_FOLDER, read_samples
from longrl.io.atomic import atomic_write, set_aside
from longrl.io.shipped_files import PACKAGE, shipped, shipped_root
from longrl.io.stop_signals import Interrupted, StopRun, current_signals
from longrl.types import Row

CONFIGS = Path("configs/demo")
PRETRAIN_OPTIONS = "--num_pretrain_videos=4000"
NUM_CARDS = 8


def main(args: Sequence[str]) -> None:
    """Command line of `run_demo`."""
    try:
        auto_cli(run_demo, args=list(args), as_positional=False, parser_class=ShortErrors, prog="python -m longrl demo")
    except StopRun:
        _say("the demo goes on with this stage by the same `python -m longrl demo` command")
        raise


def run_demo(
    out: str = "runs/demo",
    num_train_videos: int = 600,
    num_eval_videos: int = 100,
    pretrain: bool = False,
    max_steps: int | None = None,
    engine: str | None = None,
    configs: str = str(CONFIGS),
    pretrain_options: str = PRETRAIN_OPTIONS,
) -> None:
    """Trains and evaluates: base, chain-of-thought SFT, RL, and RL without seeing the video.

    A demo that was interrupted goes on where it was, by the same command.

    Args:
        out: folder of everything; the result is `results.json` and `report.html` in it.
        num_train_videos: generated videos to train on, with four questions each.
        num_eval_videos: held-out videos, with four questions each.
        max_steps: at most so many training steps in each stage, to see that everything runs.
        pretrain: make the base model from random weights first (about 20 minutes) instead of taking the one shipped.
        engine: a file that describes who generates in RL, such as configs/rollout/vllm_cpu.yaml; None is the trainer.
        configs: folder of the stages' files and the base; its common.yaml lies over that of configs/demo.
        pretrain_options: of `synthetic`, for the videos that the base model is made with.
    """
    for folder in (CONFIGS, Path(configs)):
        shipped(folder)
    options = {
        "num_train_videos": num_train_videos,
        "num_eval_videos": num_eval_videos,
        "pretrain": pretrain,
        "max_steps": max_steps,
        "engine": engine,
        "configs": configs,
        "pretrain_options": pretrain_options,
    }
    demo = _Demo(Path(out), max_steps, options, Path(configs))
    demo.make_data(num_train_videos, num_eval_videos)
    base = demo.pretrain(pretrain_options) if pretrain else Path(configs) / "base"
    demo.fit("sft", "sft.yaml", f"--model.init_from={base}")
    rollouts = [f"--rollout.engine={engine}"] if engine else []
    demo.fit("rl", "grpo.yaml", f"--model.init_from={demo.out / 'sft'}", *rollouts)
    demo.evaluate("base", base)
    demo.evaluate("sft", demo.out / "sft")
    demo.evaluate("rl", demo.out / "rl")
    demo.evaluate("blind", demo.out / "rl", "--data.blind=true")
    demo.report()


class _Demo:
    """The stages, and how long each took."""

    def __init__(
        self,
        out: Path,
        max_steps: int | None = None,
        options: Mapping[str, Any] | None = None,
        configs: Path = CONFIGS,
    ) -> None:
        self.out = out
        self.configs = configs
        self.common: list[str] = []
        for folder in dict.fromkeys((CONFIGS, configs)):
            self.common += ["--config", str(folder / "common.yaml")]
        self.stages = _Stages(out / "unfinished.json", options)
        self.steps = [] if max_steps is None else [f"--trainer.max_steps={max_steps}"]
        self.seconds = {"pretrain": 0.0, "sft": 0.0, "rl": 0.0, "evaluate": 0.0}
        self.scores: dict[str, dict[str, Any]] = {}
        self.answered: dict[str, dict[str, Any] | None] = {}
        self.out.mkdir(parents=True, exist_ok=True)

    def make_data(self, num_train_videos: int, num_eval_videos: int) -> None:
        if self.stages.begin("data"):
            counts = (f"--num_train_videos={num_train_videos}", f"--num_eval_videos={num_eval_videos}")
            self._run("synthetic", f"--out={self.out / 'data'}", *counts, "--fps=2")
            self.stages.end("data")

    def pretrain(self, options: str = PRETRAIN_OPTIONS) -> Path:
        """Makes the base model anew, by the recipe of the one that ships."""
        data, run, base = (self.out / name for name in ("pretrain_data", "pretrain", "base"))
        if not self.stages.begin("base"):
            return base
        start = time.perf_counter()
        _set_aside(base)
        counts = ("--num_train_videos=0", "--num_eval_videos=0", *shlex.split(options))
        self._run("synthetic", f"--out={data}", *counts, "--fps=2", "--seed=7")
        self._train("pretrain", "pretrain.yaml", f"--data.train={data / 'pretrain.jsonl'}")
        self._run("export", f"--run={run}", f"--out={base}", "--dtype=bfloat16")
        self.seconds["pretrain"] = time.perf_counter() - start
        self.stages.end("base")
        return base

    def fit(self, stage: str, config: str, *options: str) -> None:
        """One training stage on the generated questions."""
        start = time.perf_counter()
        self._train(stage, config, f"--data.train={self.out / 'data' / 'train.jsonl'}", *options)
        self.seconds[stage] = time.perf_counter() - start

    def _train(self, stage: str, config: str, *options: str) -> None:
        goes_on = self.stages.is_begun(stage)
        if not self.stages.begin(stage):
            return
        if not goes_on:
            _set_aside(self.out / stage)
        configs = (*self.common, "--config", str(self.configs / config))
        self._run("fit", *configs, f"--run_dir={self.out / stage}", *options, *self.steps, "--resume=auto")
        self.stages.end(stage)

    def evaluate(self, name: str, weights: Path, *options: str) -> None:
        """One answer to each held-out question."""
        start = time.perf_counter()
        folder = self.out / "evaluation" / name
        if self.stages.begin(f"evaluation of {name}"):
            _set_aside(folder)
            test_data = f"--data.test={self.out / 'data' / 'eval.jsonl'}"
            self._run("test", *self.common, f"--run_dir={folder}", f"--model.init_from={weights}", test_data, *options)
            self.stages.end(f"evaluation of {name}")
        self.seconds["evaluate"] += time.perf_counter() - start
        (summary,) = json.loads((folder / TEST_FOLDER / RESULTS_FILE).read_text())["conditions"].values()
        self.scores[name], self.answered[name] = summary["scores"], summary["answered"]

    def report(self) -> None:
        """`results.json`, `report.html` and the table on the console."""
        for name in (RESULTS_FILE, "report.html"):
            _set_aside(self.out / name)
        command = "make demo" if self.configs == CONFIGS else f"python -m longrl demo --configs {self.configs}"
        seconds = {name: round(value, 1) for name, value in self.seconds.items()}
        write_json(self.out / RESULTS_FILE, {**self.scores, "seconds": seconds})
        report = Report(
            title="longrl demo",
            subtitle="A small model learns to answer questions about videos: base, chain-of-thought SFT, GRPO.",
            results=self.scores,
            seconds=seconds,
            curves={stage: find_metrics(self.out / stage) for stage in ("sft", "rl")},
            samples=self._cards(),
            chance=0.25,
            facts={"command": command, "commit": commit()},
        )
        path = write_report(self.out, report)
        print_scores(self.scores)
        answered = self.answered["blind"]
        if answered:
            accuracy, low, high = (100 * answered[name] for name in ("accuracy", "low", "high"))
            _say(
                f"without video {answered['n']} answers name an option, and {accuracy:.1f}% [{low:.1f}, {high:.1f}] of "
                "those are right (chance: 25%)"
            )
        self.stages.finish()
        _say(f"report: {path}\nresults: {self.out / RESULTS_FILE}")

    def _cards(self) -> list[SampleCard]:
        """Some held-out questions of every category, with what each run answered."""
        source = str(self.out / "data" / "eval.jsonl")
        made = make_rows(read_records(source), longvideo_reason_row, media_root_of(source))
        rows = [row for row in made if isinstance(row, Row)]  # all of them: a malformed one is an error
        lines = []
        for run in ("sft", "rl"):
            (of_run,) = read_samples(self.out / "evaluation" / run / TEST_FOLDER).values()
            # Both runs have one condition of the same name; the cards show them under the runs' names.
            lines += [line | {"condition": run} for line in of_run]
        return cards(rows, lines, NUM_CARDS)

    def _run(self, *command: str) -> None:
        """Runs a longrl command in this process, printed as a user would type it."""
        _say(f"\n$ python -m longrl {shlex.join(command)}")
        with without_next():
            run_command(command)
        signals = current_signals()
        if signals is not None and signals.requested:  # while a run that had ended put its things away
            raise Interrupted


class _Stages:
    """Which stages have begun and ended, on disk until all have, so that an interrupted demo goes on.

    Args:
        path: of the file.
        options: of the demo; one with others begins anew. None keeps nothing on disk.
    """

    def __init__(self, path: Path, options: Mapping[str, Any] | None) -> None:
        self.path = path
        self.state: dict[str, Any] = {"options": options, "begun": [], "ended": []}
        if options is None:
            return
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.keys() == self.state.keys() and found["options"] == options:
                self.state = found
                _say(f"{path.parent} holds an interrupted demo, which goes on; delete {path} to begin anew")

    def is_begun(self, stage: str) -> bool:
        return stage in self.state["begun"]

    def begin(self, stage: str) -> bool:
        """False of a stage that has ended."""
        if stage in self.state["ended"]:
            return False
        self._add("begun", stage)
        return True

    def end(self, stage: str) -> None:
        self._add("ended", stage)

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)

    def _add(self, key: str, stage: str) -> None:
        if stage not in self.state[key]:
            self.state[key].append(stage)
        if self.state["options"] is None:
            return
        atomic_write(self.path, json.dumps(self.state, indent=2) + "\n")


def commit() -> str:
    """The checkout's commit; of an installed package its version."""
    if shipped_root() == PACKAGE.parent:
        with contextlib.suppress(OSError):  # no git here
            git = ["git", "-C", str(shipped_root()), "rev-parse", "--short", "HEAD"]
            found = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
            return found or "unknown"
    return f"longrl {version('longrl')}"


def _set_aside(path: Path) -> None:
    """Keeps an earlier result under another name, so that curves and checkpoints of two runs never mix."""
    if path.exists():
        _say(f"{path} of an earlier demo is {set_aside(path)} now")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
