"""Does T-GRPO make a model look at order? What runs with and without it lose when frames are shuffled.

The demo's base model and videos, with three questions about each: what comes first (`temporal`), where an object is,
and what the robot looks for, which a shuffled video answers as well. Of temporal ones one in eight is kept, so that few
questions of a step are about order. From one short SFT stage (which asks what comes first, or last, and leaves half of
the first to be learned) GRPO goes on as it is (Dr. GRPO's advantages, which leave a bonus in), with the paper's bonus,
with one that order has to earn, and with one as large that all right completions of temporal questions earn; with the
same steps, prompts and seeds. Then all temporal questions about held-out videos are asked once with frames in order and
once shuffled, greedily.

`loss` is what shuffling costs, `difference` what it costs beyond GRPO's; both with intervals of 95 % by a paired
bootstrap over questions, whose answers are averaged over the seeds first, and `p` is two-sided. So intervals say how
sure the numbers are for these runs; how far runs of other seeds lie apart is in the rows of `seeds`.

    python bench/frame_order.py --json bench/results/frame_order.json
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import ROOT, Row, parse_arguments, report
from demo_runs import CONFIGS, run, runs_folder
from torch import Tensor

from longrl.evaluation.samples import SAMPLES_FILE
from longrl.io.jsonl import read_jsonl, write_jsonl
from longrl.rewards.options import with_options
from longrl.testing.stories import LETTERS
from longrl.testing.synthetic_videos import SyntheticConfig, make_records

METHODS: Mapping[str, Mapping[str, float] | None] = {
    "grpo": None,
    "t_grpo": {"bonus": 0.3, "ratio": 0.8},
    "t_grpo_strict": {"bonus": 2.0, "ratio": 1.25, "num_generations": 8, "categories": ["temporal"]},
    "bonus_always": {"bonus": 2.0, "ratio": 0.0, "num_generations": 1, "categories": ["temporal"]},
}
"""Name -> `rollout.frame_order`: the paper's (arXiv:2503.21776), which nearly all right completions earn; one that
order has to earn, with as many shuffled completions as others, for of few the comparison is mostly chance; and the same
bonus without a comparison, to see which of the two teaches."""
ASKED = ("temporal", "spatial", "goal and purpose")
ORDERED, SHUFFLED = "video", "video, shuffled"
DATA_SEED = 2
"""Of the videos: sizes and options were chosen on those of other seeds."""
KEEP_EVERY = 8
"""Temporal questions of which one is trained on."""
NUM_RESAMPLES = 10_000


@dataclass(frozen=True)
class Sizes:
    """How much is trained and asked."""

    train_videos: int = 600
    eval_videos: int = 300
    sft_rows: int = 600
    sft_steps: int = 100
    rl_steps: int = 10
    prompts: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)


FULL = Sizes()
QUICK = Sizes(train_videos=8, eval_videos=4, sft_rows=16, sft_steps=2, rl_steps=2, prompts=2, seeds=(0,))


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Runs all stages in a folder of its own; `--quick` takes few steps, to see that everything runs."""
    arguments = parse_arguments(__doc__ or "", argv)
    folder = runs_folder("frame_order", arguments.quick)
    sizes = QUICK if arguments.quick else FULL
    bench = Bench(folder, sizes)
    with contextlib.chdir(ROOT):  # the demo's files name its base from here
        bench.make_data()
        bench.cold_start()
        before = bench.losses(["sft"])
        found = {method: bench.train(method) for method in METHODS}
    rows = [bench.row(method, found) for method in METHODS]
    start = [{"stage": "sft", **loss_of(before)}]
    report(__file__, arguments, rows, more={"seeds": bench.by_seed(found), "before": start})
    return rows


@dataclass(frozen=True)
class Found:
    """What a method's runs answered."""

    seconds: float
    """Of all its training runs."""
    right: Tensor
    """[seeds, 2, n] 1.0 where a temporal question was answered right: with frames in order, and shuffled."""


class Bench:
    """The runs of the bench.

    Args:
        folder: of all of them.
        sizes: how much is trained and asked.
    """

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.folder = folder
        self.sizes = sizes
        self.data = folder / "data"
        self.common = [f"--config={CONFIGS / 'common.yaml'}", f"--model.feature_cache_dir={folder / 'features'}"]

    def make_data(self) -> None:
        """Videos of the demo, and questions of this bench about them."""
        counts = {"num_train_videos": self.sizes.train_videos, "num_eval_videos": self.sizes.eval_videos}
        options = {**counts, "fps": 2, "seed": DATA_SEED}
        run("synthetic", f"--out={self.data}", *(f"--{name}={value}" for name, value in options.items()))
        records, clips = make_records(SyntheticConfig(**options))
        stories = {clip.path: [scene.name for scene in clip.story.scenes] for clip in clips}
        for split, rows in records.items():
            rows = [row for row in rows if row["problem_type"] in ASKED]
            asked = [about_order(row, stories[row["videos"]], ("first",)) for row in rows]
            temporal = [row for row in asked if row["problem_type"] == "temporal"]
            if split == "train":
                of_sft = [about_order(row, stories[row["videos"]], ("first", "last")) for row in rows]
                write_jsonl(self.data / "sft_order.jsonl", of_sft)
                others = [row for row in asked if row["problem_type"] != "temporal"]
                write_jsonl(self.data / "train_order.jsonl", [*others, *temporal[::KEEP_EVERY]])
            if split == "eval":
                write_jsonl(self.data / "temporal.jsonl", temporal)

    def cold_start(self) -> None:
        """The SFT stage that all RL runs begin from."""
        steps = [f"--trainer.max_steps={self.sizes.sft_steps}", f"--data.max_train_rows={self.sizes.sft_rows}"]
        self._fit("sft", "sft.yaml", f"--data.train={self.data / 'sft_order.jsonl'}", *steps)

    def train(self, method: str) -> Found:
        """RL by a method, once for each seed, and what it answers."""
        order = METHODS[method]
        given = [] if order is None else [f"--rollout.frame_order={json.dumps(order)}"]
        start = time.perf_counter()
        names = []
        for seed in self.sizes.seeds:
            names.append(f"{method}_{seed}")
            options = [
                f"--data.train={self.data / 'train_order.jsonl'}",
                f"--trainer.max_steps={self.sizes.rl_steps}",
                f"--data.prompts_per_batch={self.sizes.prompts}",
                "--data.blind_share=0",
                f"--data.seed={seed}",
                f"--rollout.seed={seed}",
                f"--model.init_from={self.folder / 'sft'}",
                "--model.algorithm.advantage=longrl.algorithms.group_centered",
                *given,
            ]
            self._fit(names[-1], "grpo.yaml", *options)
        seconds = time.perf_counter() - start
        return Found(seconds, self.losses(names))

    def losses(self, names: Sequence[str]) -> Tensor:
        """[runs, 2, n] which temporal questions each run answers right, in order and shuffled."""
        right = []
        for name in names:
            out = self.folder / "evaluation" / name
            run(
                "evaluate", "--policy=longrl.evaluation.local_policy.LocalPolicy", "--policy.init_args.device=cpu",
                f"--policy.init_args.weights={self.folder / name}",
                f"--policy.init_args.feature_cache_dir={self.folder / 'features'}",
                f"--data.test={self.data / 'temporal.jsonl'}", "--data.eval_prompts_per_batch=50",
                "--sampling.temperature=0", "--sampling.max_completion_tokens=80", "--shuffled_baseline=true",
                f"--out={out}", "--num_cards=0",
            )  # fmt: skip
            by_condition: dict[str, list[float]] = {ORDERED: [], SHUFFLED: []}
            for line in read_jsonl(out / SAMPLES_FILE):
                by_condition[line["condition"]].append(line["strict_accuracy"])
            right.append([by_condition[ORDERED], by_condition[SHUFFLED]])
        return torch.tensor(right, dtype=torch.float64)

    def row(self, method: str, found: Mapping[str, Found]) -> Row:
        """A method's loss, and how far it is from GRPO's."""
        mine = found[method]
        values: dict[str, Any] = {
            "method": method,
            "steps": self.sizes.rl_steps,
            "seconds": round(mine.seconds / len(self.sizes.seeds), 1),
            **loss_of(mine.right),
        }
        gain = per_question(mine.right) - per_question(found["grpo"].right)  # [n]
        low, high, p = bootstrap(gain)
        empty = method == "grpo"
        values["difference"] = "" if empty else round(float(gain.mean()), 4)
        values["difference_low"], values["difference_high"] = ("", "") if empty else (low, high)
        values["p"] = "" if empty else p
        return values

    def by_seed(self, found: Mapping[str, Found]) -> list[Row]:
        """The loss of every single run."""
        return [
            {"method": method, "seed": seed, **loss_of(right[None])}
            for method, one in found.items()
            for seed, right in zip(self.sizes.seeds, one.right, strict=True)
        ]

    def _fit(self, name: str, config: str, *options: str) -> None:
        stage = f"--config={CONFIGS / config}"
        cached = f"--data.cached_media={self.sizes.train_videos}"
        run("fit", *self.common, stage, f"--run_dir={self.folder / name}", cached, *options)


def about_order(row: Mapping[str, Any], objects: Sequence[str], words: Sequence[str]) -> dict[str, Any]:
    """The record with its temporal question replaced by one that a small model learns soon: what comes first, or last.

    Args:
        row: of the generator; of other categories it stays.
        objects: of its video, in order.
        words: `first` and `last`, or one of them.
    """
    if row["problem_type"] != "temporal":
        return dict(row)
    rng = Random(f"{words} of {row['videos']}")
    word = rng.choice(words)
    right = objects[0 if word == "first" else -1]
    options = rng.sample([name for name in objects if name != right], len(LETTERS) - 1)
    letter = rng.randrange(len(LETTERS))
    options.insert(letter, right)
    listing = row["reasoning"].rpartition(". ")[0]
    return {
        **row,
        "problem": with_options(f"What comes {word}?", options),
        "reasoning": f"{listing}. The {right} comes {word}.",
        "answer": f"<answer>{LETTERS[letter]}</answer>",
    }


# ---- how sure a number is ----


def per_question(right: Tensor) -> Tensor:
    """[n] mean over seeds of right in order minus right when shuffled; `right` is [seeds, 2, n]."""
    return (right[:, 0] - right[:, 1]).mean(0)


def loss_of(right: Tensor) -> dict[str, float | int]:
    """Accuracies, what shuffling costs with its interval, and the number of questions; `right` is [seeds, 2, n]."""
    low, high, _ = bootstrap(per_question(right))
    return {
        "accuracy_ordered": round(float(right[:, 0].mean()), 4),
        "accuracy_shuffled": round(float(right[:, 1].mean()), 4),
        "loss": round(float(per_question(right).mean()), 4),
        "low": low,
        "high": high,
        "n": right.shape[-1],
    }


def bootstrap(values: Tensor) -> tuple[float, float, float]:
    """Interval of 95 % of the mean of [n] questions that are drawn anew, and its two-sided p that the mean is 0."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=generator)
    means = values[drawn].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    beyond = min(float((means <= 0).double().mean()), float((means >= 0).double().mean()))
    return round(low, 4), round(high, 4), round(min(1.0, 2 * beyond), 4)


if __name__ == "__main__":
    main()
