"""Do a model's own answers teach it? Accuracy of the demo's SFT model, and after training on what it answered itself.

The demo's cold start answers every training question several times. Its right and wrong answers make pairs, and its
right answers alone a set to imitate (`own-answers`); DPO, IPO and MPO train on the pairs, rejection sampling (RFT) on
the right answers, each from the same cold start. Held-out questions are asked as in the demo: one answer at temperature
1. All is done by longrl's own commands, which are printed.

    python bench/preferences.py --json bench/results/preferences.json
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, Row, parse_arguments, report
from demo_runs import CONFIGS, overall_row, run, runs_folder

from longrl.evaluation.curves import find_metrics, read_metrics
from longrl.io.jsonl import read_jsonl, write_jsonl

PREFERENCES = ROOT / "configs" / "preference"
LOSSES = {
    "dpo": (),
    "ipo": (f"--model.preference={PREFERENCES / 'ipo.yaml'}", "--model.preference.beta=5"),
    "mpo": (f"--model.preference={PREFERENCES / 'mpo.yaml'}", "--model.preference.beta=0.5"),
}
"""Method -> its options beside those of configs/demo/dpo.yaml."""
CURVES = ("loss", "preference_accuracy", "reward_margin", "logp_chosen", "logp_rejected")


@dataclass(frozen=True)
class Sizes:
    """How much is trained, answered and asked."""

    train_videos: int = 600
    eval_videos: int = 100
    sft_steps: int = 100
    steps: int = 60
    answers: int = 8
    options: tuple[str, ...] = ()


FULL = Sizes()
QUICK = Sizes(8, 2, sft_steps=2, steps=2, answers=2, options=("--data.prompts_per_batch=2",))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs all stages in a folder of its own; `--quick` takes few steps, to see that everything runs."""
    arguments = parse_arguments(__doc__ or "", argv)
    folder = runs_folder("preferences", arguments.quick)
    sizes = QUICK if arguments.quick else FULL
    bench = Bench(folder, sizes)
    with contextlib.chdir(ROOT):  # the demo's files name its base from here
        bench.make_data()
        rows = [bench.cold_start()]
        answered = bench.answer()
        rows += [bench.train(method) for method in LOSSES]
        rows.append(bench.imitate())
    report(__file__, arguments, rows, more={"answers": [answered], "pairs": [bench.margins(name) for name in LOSSES]})
    return rows


class Bench:
    """The runs of the bench.

    Args:
        folder: of all of them.
        sizes: how much is trained, answered and asked.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.common = [f"--config={CONFIGS / 'common.yaml'}"]
        self.train_file = folder / "data" / "train.jsonl"

    def make_data(self) -> None:
        """Videos of the demo."""
        counts = [f"--num_train_videos={self.sizes.train_videos}", f"--num_eval_videos={self.sizes.eval_videos}"]
        run("synthetic", f"--out={self.folder / 'data'}", *counts, "--fps=2")

    def cold_start(self) -> Row:
        """The SFT stage that all others begin from."""
        return self._fit("sft", "sft.yaml", self.train_file, self.sizes.sft_steps)

    def answer(self) -> Row:
        """The cold start's answers to the training questions, as pairs and as targets."""
        start = time.perf_counter()
        answers = self.folder / "answers"
        options = [f"--data.test={self.train_file}", f"--rollout.eval_sampling.num_generations={self.sizes.answers}"]
        run("predict", *self.common, f"--run_dir={answers}", f"--model.init_from={self.folder / 'sft'}", *options)
        seconds = time.perf_counter() - start
        sources = [f"--run={answers}", f"--questions={self.train_file}"]
        if self.sizes is QUICK:
            self._records_of_any(sources)
        else:
            run("own-answers", *sources, f"--out={self._records('pairs')}", "--kind=pairs", "--per_question=4")
            run("own-answers", *sources, f"--out={self._records('sft')}", "--kind=sft", "--per_question=4")
        counts = {kind: len(read_jsonl(self._records(kind))) for kind in ("pairs", "sft")}
        questions = len(read_jsonl(self.train_file))
        return {"questions": questions, "answers": self.sizes.answers, "seconds": round(seconds, 1), **counts}

    def train(self, method: str) -> Row:
        """A method on the pairs."""
        options = (*LOSSES[method], *self.sizes.options)
        return self._fit(method, "dpo.yaml", self._records("pairs"), self.sizes.steps, *options)

    def imitate(self) -> Row:
        """SFT on the right answers."""
        options = ["--data.stage=sft", "--model.preference=null", *self.sizes.options]
        return self._fit("rft", "dpo.yaml", self._records("sft"), self.sizes.steps, *options)

    def margins(self, method: str) -> Row:
        """What the first and the last step of a run said of its pairs."""
        metrics = read_metrics(find_metrics(self.folder / method))
        shown: dict[str, int | float | str] = {"method": method}
        for name in CURVES:
            values = list(metrics[f"train/{name}"].values())
            shown |= {f"{name}_first": round(values[0], 4), f"{name}_last": round(values[-1], 4)}
        return shown

    def _records_of_any(self, sources: Sequence[str]) -> None:
        """Records of a model that has learned nothing yet: any answer is right, and the next one wrong."""
        out = self._records("sft")
        run("own-answers", *sources, f"--out={out}", "--kind=sft", "--right_from=0", "--wrong_below=0")
        records = read_jsonl(out)
        pairs = [one | {"rejected": other["chosen"] + " No."} for one, other in itertools.pairwise(records)]
        write_jsonl(self._records("pairs"), pairs)

    def _records(self, kind: str) -> Path:
        """A file beside the questions, where their videos are found."""
        return self.folder / "data" / f"{kind}.jsonl"

    def _fit(self, name: str, config: str, train: Path, steps: int, *options: str) -> Row:
        """Trains a stage and asks what it has learned."""
        start = time.perf_counter()
        run_dir = self.folder / name
        given = [f"--config={CONFIGS / config}", f"--run_dir={run_dir}", f"--data.train={train}"]
        if name != "sft":
            given.append(f"--model.init_from={self.folder / 'sft'}")
        run("fit", *self.common, *given, f"--trainer.max_steps={steps}", *options)
        seconds = time.perf_counter() - start
        return {"method": name, "steps": steps, "seconds": round(seconds, 1), **self._scores(name)}

    def _scores(self, name: str) -> Row:
        """Accuracy of a stage on held-out questions, with its interval of 95 % (Wilson)."""
        folder = self.folder / "evaluation" / name
        test = f"--data.test={self.folder / 'data' / 'eval.jsonl'}"
        run("test", *self.common, f"--run_dir={folder}", f"--model.init_from={self.folder / name}", test)
        return overall_row(folder)


if __name__ == "__main__":
    main()
