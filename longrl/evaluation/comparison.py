"""Comparison of two runs, question by question, on those that both answered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrl.evaluation.samples import SAMPLES_FILE, read_samples, records_of
from longrl.evaluation.scores import OVERALL, Difference, Question, by_question, mean_of, paired_difference
from longrl.io.jsonl import read_jsonl

Records = Mapping[str, Question]
"""Question id -> the records of its completions."""
RunRecords = Mapping[str, Records]
"""Condition -> its answered questions."""
OLD_PREDICTIONS = "predictions.jsonl"
"""File that `test` wrote before it wrote samples.jsonl: a line per completion. Read for one release more."""


@dataclass(frozen=True)
class Comparison:
    """A second condition against a first, e.g. the same one of two runs."""

    first: str
    second: str
    strict: dict[str, Difference]
    """`overall` and by category."""
    robust: dict[str, Difference]
    won: list[str]
    """Ids of the questions that the second answers right more often (strict)."""
    lost: list[str]
    left_out: int
    """Questions that only one of them answered, or that are not the same under one id."""

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return asdict(self)

    def table_rows(self) -> list[list[str]]:
        """For each category: strict and robust difference, questions, won and lost ones."""
        return [
            [category, points(one), points(self.robust[category]), str(one.n), str(one.won), str(one.lost)]
            for category, one in self.strict.items()
        ]


def points(difference: Difference) -> str:
    """A difference in percentage points with its interval: "+3.1 [-0.4, +6.6]"."""
    return f"{100 * difference.difference:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def compare_folders(first: str | Path, second: str | Path) -> dict[str, Comparison]:
    """Compares the conditions that two runs share by name; or the only ones.

    Raises:
        ValueError: a folder without answers, or no question in common.
    """
    return compare_runs(first, read_run(first), second, read_run(second))


def compare_runs(first: str | Path, before: RunRecords, second: str | Path, after: RunRecords) -> dict[str, Comparison]:
    """`compare_folders` of runs that are read already.

    Args:
        first: folder of the first run, for its name.
        before: `read_run` of it.
        second: folder of the second run.
        after: `read_run` of that.

    Returns:
        Condition -> comparison.
    """
    pairs = {name: (name, name) for name in before if name in after}
    if not pairs and len(before) == len(after) == 1:
        one, two = next(iter(before)), next(iter(after))
        pairs = {f"{one} against {two}": (one, two)}
    if not pairs:
        raise ValueError(
            f"no condition is in both runs: {first} has {', '.join(before)}, and {second} has {', '.join(after)}; "
            "evaluate both under one, such as the same --frames"
        )
    name, other = _distinct_names(first, second)
    return {condition: compare_records(name, before[one], other, after[two]) for condition, (one, two) in pairs.items()}


def _distinct_names(first: str | Path, second: str | Path) -> list[str]:
    """Shortest ends of two paths that differ: a/evaluation/mme and b/evaluation/mme as they are."""
    parts = [Path(folder).expanduser().resolve().parts for folder in (first, second)]
    longest = max(map(len, parts))
    count = next((n for n in range(1, longest) if parts[0][-n:] != parts[1][-n:]), 1)
    return ["/".join(part[-count:]) for part in parts]


def read_run(folder: str | Path) -> RunRecords:
    """The answered questions of a run's folder by condition.

    Raises:
        ValueError: it has no samples, or one id twice.
    """
    folder = Path(folder).expanduser()
    if (folder / SAMPLES_FILE).is_file():
        return {name: _by_id(map(records_of, lines)) for name, lines in read_samples(folder).items()}
    if (folder / OLD_PREDICTIONS).is_file():
        return {"video": _by_id(by_question(read_jsonl(folder / OLD_PREDICTIONS)))}
    raise ValueError(f"{folder} has no {SAMPLES_FILE} of `evaluate` or `test`; name a run that came to its end")


def _by_id(questions: Iterable[Question]) -> Records:
    by_id: dict[str, Question] = {}
    for records in questions:
        if records and records[0]["id"] in by_id:
            raise ValueError(f"two runs are compared by their questions' ids, but {records[0]['id']!r} is there twice")
        if records:
            by_id[records[0]["id"]] = records
    return by_id


def compare_records(first: str, before: Records, second: str, after: Records) -> Comparison:
    """The gain of the second over the first on the questions that both answered.

    Raises:
        ValueError: there are none.
    """
    common = [name for name in before if name in after and _is_same(before[name][0], after[name][0])]
    if not common:
        raise ValueError(
            f"{first} and {second} have no question in common that both answered; evaluate both on one data set"
        )
    categories = sorted({before[name][0]["category"] for name in common} - {OVERALL})
    ids_of = {OVERALL: common}
    ids_of |= {each: [name for name in common if before[name][0]["category"] == each] for each in categories}

    gains = {name: mean_of(after[name], "correct") - mean_of(before[name], "correct") for name in common}
    return Comparison(
        first,
        second,
        strict=_differences(before, after, ids_of, "correct"),
        robust=_differences(before, after, ids_of, "correct_lenient"),
        won=[name for name in common if gains[name] > 0],
        lost=[name for name in common if gains[name] < 0],
        left_out=len(before.keys() | after.keys()) - len(common),
    )


def _differences(
    before: Records, after: Records, ids_of: Mapping[str, Sequence[str]], field: str
) -> dict[str, Difference]:
    differences = {}
    for category, ids in ids_of.items():
        first, second = ([record for name in ids for record in run[name]] for run in (before, after))
        differences[category] = paired_difference(first, second, field)
    return differences


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two questions of one id are one; old predictions have no hash."""
    field = "doc_hash" if "doc_hash" in one and "doc_hash" in other else "answer"
    return one[field] == other[field]
