"""Does it pay not to wait for the slowest completion? Time and accuracy of a run at `rollout.max_staleness` 0, 1 and 2.

The RL stage of the demo from one SFT checkpoint, each time with the same two servers beside it, whose completions take
as long as long-tailed ones would: the server computes them with the demo's model, then hands tokens out at a rate that
is drawn for each completion (log-normal), asleep in between, so that it does not take the trainer's cores
(longrl/testing/engine_server.py). All is done by longrl's own commands, which are printed.

`trainer_busy` is the share of the steps' time in which the trainer does not wait for completions; the first steps,
which fill the queue, count.

    python bench/asynchronous.py --json bench/results/asynchronous.json
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, Row, parse_arguments, report
from demo_runs import CONFIGS, overall_row, run, runs_folder

from longrl.evaluation.curves import find_metrics, read_metrics
from longrl.testing.engine_servers import EngineServers

STALENESS = (0, 1, 2)
AGES = ("staleness_mean", "staleness_max", "cut_share", "asked_again", "dropped", "engine_busy", "engine_requests")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    train_videos: int = 600
    eval_videos: int = 100
    sft_steps: int = 100
    rl_steps: int = 100
    prompts: int = 16
    num_servers: int = 2
    seconds_per_token: float = 0.01
    tail: float = 0.8
    """Deviation of the logarithm of a completion's time per token."""


FULL = Sizes()
QUICK = Sizes(train_videos=12, eval_videos=4, sft_steps=2, rl_steps=3, prompts=2, seconds_per_token=0.002)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs all stages in a folder of its own; `--quick` takes few steps, to see that everything runs."""
    arguments = parse_arguments(__doc__ or "", argv)
    folder = runs_folder("asynchronous", arguments.quick)
    sizes = QUICK if arguments.quick else FULL
    bench = Bench(folder, sizes)
    with contextlib.chdir(ROOT):  # the demo's files name its base from here
        bench.make_data()
        bench.cold_start()
        before = {"stage": "sft", **bench.scores("sft")}
        rows = [bench.train(max_staleness) for max_staleness in STALENESS]
        ages = [bench.ages(max_staleness) for max_staleness in STALENESS]
    report(__file__, arguments, rows, more={"ages": ages, "before": [before]})
    return rows


class Bench:
    """The runs of the bench.

    Args:
        folder: of all of them.
        sizes: how much is trained and asked.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.common = [f"--config={CONFIGS / 'common.yaml'}", f"--data.test={folder / 'data' / 'eval.jsonl'}"]

    def make_data(self) -> None:
        """Videos of the demo."""
        counts = [
            f"--num_train_videos={self.sizes.train_videos}",
            f"--num_eval_videos={self.sizes.eval_videos}",
        ]
        run("synthetic", f"--out={self.folder / 'data'}", *counts, "--fps=2")

    def cold_start(self) -> None:
        """The SFT stage that all RL runs begin from."""
        self._fit("sft", "sft.yaml", f"--trainer.max_steps={self.sizes.sft_steps}")

    def train(self, max_staleness: int) -> Row:
        """RL with servers of its own, and what it has learned."""
        name = f"rl_{max_staleness}"
        weights = self.folder / f"weights_{max_staleness}"
        options = [
            f"--trainer.max_steps={self.sizes.rl_steps}",
            f"--data.prompts_per_batch={self.sizes.prompts}",
            f"--model.init_from={self.folder / 'sft'}",
            "--rollout.engine=longrl.engines.server.VLLMServerEngine",
            f"--rollout.engine.weights_folder={weights}",
            f"--rollout.max_staleness={max_staleness}",
        ]
        weights.mkdir(parents=True)
        pace = {"seconds_per_token": self.sizes.seconds_per_token, "tail": self.sizes.tail}
        with EngineServers([CONFIGS / "common.yaml"], weights, self.folder / f"{name}_servers.log", **pace) as servers:
            urls = [servers.start() for _ in range(self.sizes.num_servers)]
            start = time.perf_counter()
            self._fit(name, "grpo.yaml", *options, f"--rollout.engine.urls={json.dumps(urls)}")
            seconds = time.perf_counter() - start
        metrics = self._metrics(max_staleness)
        step_s = metrics["time/step"]
        waited_s = sum(metrics["time/generate"].values())
        return {
            "max_staleness": max_staleness,
            "trainer_busy": round(1 - waited_s / sum(step_s.values()), 3),
            "steps": len(step_s),
            "seconds": round(seconds, 1),
            **self.scores(name),
        }

    def ages(self, max_staleness: int) -> Row:
        """Of which weights the tokens were that a run trained on, and what became of its prompts."""
        metrics = self._metrics(max_staleness)
        means = {}
        for name in AGES:
            values = metrics.get(f"rollout/{name}")
            means[name] = round(statistics.fmean(values.values()), 3) if values else ""  # not measured at 0 and 1
        return {"max_staleness": max_staleness, **means}

    def scores(self, name: str) -> Row:
        """Accuracy of a stage on held-out questions, with its interval of 95 %."""
        folder = self.folder / "evaluation" / name
        run("test", *self.common, f"--run_dir={folder}", f"--model.init_from={self.folder / name}")
        return overall_row(folder)

    def _metrics(self, max_staleness: int) -> dict[str, dict[int, float]]:
        return read_metrics(find_metrics(self.folder / f"rl_{max_staleness}"))

    def _fit(self, name: str, config: str, *options: str) -> None:
        stage = f"--config={CONFIGS / config}"
        train = f"--data.train={self.folder / 'data' / 'train.jsonl'}"
        run("fit", *self.common, stage, f"--run_dir={self.folder / name}", train, *options)


if __name__ == "__main__":
    main()
