"""A run's own answers as records to train on: the best ones to imitate, or pairs of a right and a wrong one.

Rejection sampling (RFT, arXiv:2308.01825): what a policy has answered rightly, of several answers to each question,
teaches it by SFT; pairs of its right and its wrong answers teach it what to prefer. Answers are those that `predict`,
`test` or `evaluate` sampled and judged, and stand in the records to the letter, thinking included.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longrl.evaluation.answering import doc_hash
from longrl.evaluation.samples import PREDICT_FOLDER, SAMPLES_FILE, TEST_FOLDER, SampleLine, read_samples
from longrl.io.number_ranges import COUNT, FINITE, check_ranges
from longrl.types import Row

Kind = Literal["pairs", "sft"]


@dataclass(frozen=True)
class ChoiceRules:
    """Which of the answers to a question are taken.

    An answer's score is its accuracy or, where no rule judges it, its reward. Answers that were cut off or took several
    turns are left out, and of those that differ in white space alone all but the first.
    """

    kind: Kind = "pairs"
    """`pairs` of a right and a wrong answer, or right ones to imitate."""
    per_question: int = 1
    """Most records that are taken of one question."""
    right_from: float = 1.0
    """Score from which an answer is right."""
    wrong_below: float = 0.5
    """Score below which an answer is wrong; between this and `right_from` it is neither."""
    min_reward: float | None = None
    """Reward that a right answer must have."""
    max_length_ratio: float | None = None
    """The longer answer of a pair has at most so many times the characters of the other."""

    def __post_init__(self) -> None:
        check_ranges(self, "--", per_question=COUNT, right_from=FINITE, wrong_below=FINITE, min_reward=FINITE)
        check_ranges(self, "--", max_length_ratio=COUNT)
        if self.wrong_below > self.right_from:
            raise ValueError(
                f"--wrong_below must be at most --right_from, got {self.wrong_below} and {self.right_from}; an answer "
                "would be right and wrong"
            )


@dataclass(frozen=True)
class OwnAnswer:
    """A judged answer."""

    text: str
    score: float
    reward: float


@dataclass
class ChosenRecords:
    """Records to train on, and how they came about."""

    records: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Questions and answers by what became of them."""

    def summary(self) -> dict[str, float]:
        """What is worth a line: the counts, and mean lengths in characters."""
        lengths = {}
        for name in ("chosen", "rejected"):
            found = [len(record[name]) for record in self.records if name in record]
            if found:
                lengths[f"mean characters, {name}"] = round(statistics.fmean(found), 1)
        return {"records": len(self.records), **dict(sorted(self.counts.items())), **lengths}


def choose_records(
    lines: Sequence[SampleLine], rows: Sequence[Row], rules: ChoiceRules, media_root: str | None = None
) -> ChosenRecords:
    """The records that the rules make of sampled answers.

    Args:
        lines: of a samples.jsonl, of one condition.
        rows: the questions that were asked, in their order.
        rules: what is taken.
        media_root: where paths of media start in the records.

    Raises:
        ValueError: the lines are about other questions.
    """
    chosen = ChosenRecords()
    for line in lines:
        index = line["doc_id"]
        if index >= len(rows) or doc_hash(rows[index]) != line["doc_hash"]:
            raise ValueError(
                f"question {line['id']!r} of the answers is not number {index} of --questions; name what was asked, as "
                "--data.test of that command did, with its --row_function"
            )
        answers = usable_answers(line, chosen.counts)
        taken = choose(answers, rules, chosen.counts)
        chosen.counts["questions"] += 1
        chosen.counts["questions with a record"] += bool(taken)
        for number, texts in enumerate(taken):
            record = record_of(rows[index], media_root)
            record["problem_id"] += f"-{number}" if rules.per_question > 1 else ""
            chosen.records.append(record | texts)
    return chosen


def usable_answers(line: SampleLine, counts: Counter[str]) -> list[OwnAnswer]:
    """The answers of a line that have a score, each text once, in the order sampled; others are counted."""
    if line["error"] is not None or "resps" not in line:
        counts["answers to questions without a score"] += 1
        return []
    if line.get("turns"):
        counts["answers of several turns"] += len(line["resps"][0])
        return []
    answers = {}
    for number, text in enumerate(line["resps"][0]):
        score, reward = line["accuracy"][number], line["reward"][number]
        score = reward if score is None else score
        if line["finish_reason"][number] == "length":
            counts["answers cut off"] += 1  # as a target they would end where the policy did not
        elif score is None:
            counts["answers without a score"] += 1
        elif (known := " ".join(text.split())) in answers or not known:
            counts["answers repeated or empty"] += 1
        else:
            answers[known] = OwnAnswer(text, score, score if reward is None else reward)
    return list(answers.values())


def choose(answers: Sequence[OwnAnswer], rules: ChoiceRules, counts: Counter[str]) -> list[dict[str, str]]:
    """The answers that are taken, as fields of records: the best right ones and, for pairs, the worst wrong ones.

    A pair's wrong answer is one of the lowest reward that no other pair has, of those the one nearest in length.
    """
    # 1. Sorting keeps the order sampled among equals.
    least = float("-inf") if rules.min_reward is None else rules.min_reward
    right = [answer for answer in answers if answer.score >= rules.right_from and answer.reward >= least]
    wrong = [answer for answer in answers if answer.score < rules.wrong_below]
    right.sort(key=lambda answer: -answer.reward)
    if not right:
        counts["questions without a right answer"] += 1
    if rules.kind == "sft":
        return [{"chosen": answer.text} for answer in right[: rules.per_question]]
    if not wrong:
        counts["questions without a wrong answer"] += 1

    # 2. Pairs, the best answer first.
    pairs: list[dict[str, str]] = []
    for best in right:
        near = [answer for answer in wrong if _fits(best, answer, rules.max_length_ratio)]
        if len(pairs) == rules.per_question or not near:
            continue
        worst = min(near, key=lambda answer: (answer.reward, abs(len(answer.text) - len(best.text))))
        wrong.remove(worst)
        pairs.append({"chosen": best.text, "rejected": worst.text})
    if right and not pairs and rules.max_length_ratio is not None:
        counts["questions whose answers differ too much in length"] += bool(wrong)
    return pairs


def _fits(one: OwnAnswer, other: OwnAnswer, ratio: float | None) -> bool:
    lengths = sorted((len(one.text), len(other.text)))
    return ratio is None or lengths[1] <= ratio * lengths[0]


def record_of(row: Row, media_root: str | None = None) -> dict[str, Any]:
    """A row as a record of longrl's own schema, without what it taught.

    Args:
        row: of any source.
        media_root: where its paths of media start again.
    """
    metadata = dict(row.metadata)
    tools = metadata.pop("tools", None)
    if isinstance(metadata.get("subtitles"), str):
        metadata["subtitles"] = _below(metadata["subtitles"], media_root)
    media = {name: [_below(path, media_root) for path in getattr(row, name)] for name in ("videos", "images", "audios")}
    asked: dict[str, Any] = {"messages": list(row.messages)} if row.messages else {"problem": row.problem}
    fields = {
        "problem_id": row.id,
        **asked,
        "answer": row.answer,
        "task": row.task,
        "problem_type": row.category,
        **{name: paths for name, paths in media.items() if paths},
        "metadata": metadata,
        "tools": tools,
    }
    return {name: value for name, value in fields.items() if value}


def _below(path: str, root: str | None) -> str:
    """The path as seen from a folder that it lies in."""
    if root is None or "://" in path or not Path(path).is_relative_to(root):
        return path
    return Path(path).relative_to(root).as_posix()


def find_answers(folder: str | Path, condition: str | None = None) -> list[SampleLine]:
    """The answers of an evaluation: of `predict` or `test` in a run's folder, or of `evaluate`.

    Args:
        folder: the run's, or that of the answers.
        condition: which of several is meant.

    Raises:
        ValueError: there are none, or several conditions.
    """
    places = [Path(folder) / name for name in (PREDICT_FOLDER, TEST_FOLDER, ".")]
    found: Mapping[str, list[SampleLine]] = {}
    for place in places:
        if (place / SAMPLES_FILE).is_file() and not found:
            found = read_samples(place)
    if not found:
        raise ValueError(
            f"{folder} has no answers of `predict`, `test` or `evaluate`; sample some by `python -m longrl predict "
            "--data.test QUESTIONS --rollout.eval_sampling.num_generations 8 ...` (training keeps only a few)"
        )
    if condition is None and len(found) == 1:
        return next(iter(found.values()))
    if condition is None or condition not in found:
        raise ValueError(f"--condition must be one of {', '.join(map(repr, found))}, got {condition!r}")
    return found[condition]
