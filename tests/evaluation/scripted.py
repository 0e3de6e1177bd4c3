"""Policies without weights, benchmarks of a few generated videos, and evaluations of the one on the other."""

from __future__ import annotations

import functools
import json
import os
import signal
import tempfile
from pathlib import Path

from longrl.commands.evaluate import parse_evaluation
from longrl.commands.main import main
from longrl.datamodules.rows.question_rows import longvideo_reason_row
from longrl.evaluation.answering import Answer, Policy, hash_json
from longrl.evaluation.benchmark import Evaluation
from longrl.evaluation.endpoint_policy import ChatReader
from longrl.io.jsonl import read_jsonl
from longrl.testing.synthetic_videos import SyntheticConfig, generate_videos
from longrl.types import Row


class Scripted(Policy):
    """Reads rows as a policy behind an endpoint does, and answers by `say`.

    Args:
        says: a text; `{gold}` in it is the right answer.
        model: its name.
        log: file that gets a line for every question asked.
        dies_after: batches after which the process is killed.
    """

    def __init__(
        self, says: str = "<answer>B</answer>", model: str = "scripted", log: str | None = None,
        dies_after: int | None = None,
    ) -> None:  # fmt: skip
        self.says, self.model, self.log, self.dies_after = says, model, log, dies_after

    @property
    def family(self):
        return ChatReader(64)

    def prepare(self, folder):
        pass

    def identity(self):
        return {"model": self.model, "revision": None, "engine": "scripted"}

    def check(self, sampling):
        pass

    def say(self, index: int, row: Row) -> str:
        return self.says.replace("{gold}", row.answer)

    def answer(self, batches, sampling, seed, save):
        for number, batch in enumerate(batches):
            if number == self.dies_after:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.log:
                with open(self.log, "a") as file:
                    file.writelines(f"{prompt.id}\n" for _, prompt in batch)
            save({index: self._answer(self.say(index, prompt.row), prompt) for index, prompt in batch})

    @staticmethod
    def _answer(text, prompt):
        reason = "length" if text.endswith("...") else "stop"
        return Answer(
            [text], [reason], [len(text)], 10, None, prompt.text, hash_json(prompt.text),
            [list(indices) for indices in prompt.frame_indices], [list(times) for times in prompt.frame_times],
            len(prompt.torn_videos),
        )  # fmt: skip


class Mixed(Scripted):
    """Right with tag, right without, wrong, and cut off, in turn."""

    def say(self, index, row):
        wrong = "A" if row.answer != "A" else "B"
        texts = (
            f"<think>x</think><answer>{row.answer}</answer>",
            f"So the answer is {row.answer}.",
            f"<think>x</think><answer>{wrong}</answer>",
            "<think>I wonder ...",
        )
        return texts[index % 4]


def video_mme_like_row(record, index, media_root=None) -> Row:
    """The contract of breakdowns: metadata holds the fields."""
    row = longvideo_reason_row(record, index, media_root)
    names = ("video_id", "duration", "domain", "task_type")
    values = {name: record[name] for name in names}
    return Row(**{**vars(row), "category": record["domain"], "metadata": values})


@functools.cache
def folder() -> Path:
    """2 videos of 4 questions each, as files of LongVideo-Reason."""
    made = Path(tempfile.mkdtemp(prefix="longrl-benchmark-")) / "synthetic"
    generate_videos(made, SyntheticConfig(0, 2, scene_s=2.0, size=56))
    return made


def questions() -> Path:
    return folder() / "eval.jsonl"


def records() -> list[dict]:
    return read_jsonl(questions())


def benchmark(target: Path, changed: list[dict]) -> Path:
    """Records in a file of their own, their videos where they are."""
    file = target / "questions.jsonl"
    lines = [{**record, "videos": str(folder() / record["videos"])} for record in changed]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def arguments(out: Path, *more: str, policy: str = "Scripted", test: Path | None = None, **options: object) -> list:
    """Command line of an evaluation; `options` are the policy's."""
    given = {"class_path": f"tests.evaluation.scripted.{policy}", "init_args": options}
    return [
        f"--policy={json.dumps(given)}", f"--out={out}", f"--data.test={test or questions()}",
        "--data.video.fps=1.0", "--data.allow_outside_paths=true",
        "--data.eval_prompts_per_batch=3", "--num_cards=2", *more,
    ]  # fmt: skip


def evaluation(out: Path, *more: str, **options: object) -> Evaluation:
    return Evaluation(*parse_evaluation(arguments(out, *more, **options)))


def evaluated(out: Path, *more: str, **options: object) -> dict:
    """The results of an evaluation."""
    return evaluation(out, *more, **options).run().results


def command(out: Path, *more: str, **options: object) -> None:
    main(["evaluate", *arguments(out, *more, **options)])
