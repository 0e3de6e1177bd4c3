"""Comparison of two runs, question by question, on those that both answered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrl.evaluation.samples import RESULTS_FILE, SAMPLES_FILE, TEST_FOLDER, read_samples, records_of
from longrl.evaluation.scores import OVERALL, Difference, Responses, by_question, paired_difference, question_gains
from longrl.io.jsonl import read_jsonl

Records = Mapping[str, Responses]
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
    differences: list[str] = field(default_factory=list)
    """What the two were not asked alike in: protocol, sampling, frames, budget, prompts."""

    def table_rows(self) -> list[list[str]]:
        """For each category: strict and robust difference, questions, won and lost ones."""
        return [
            [category, format_points(one), format_points(self.robust[category]), *map(str, (one.n, one.won, one.lost))]
            for category, one in self.strict.items()
        ]


def format_points(difference: Difference) -> str:
    """A difference in percentage points with its interval: "+3.1 [-0.4, +6.6]"."""
    return f"{100 * difference.difference:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def compare_folders(first: str | Path, second: str | Path, before: RunRecords | None = None) -> dict[str, Comparison]:
    """Compares the conditions that two runs share by name; or the only ones.

    Args:
        first: folder of the first run.
        second: folder of the second run.
        before: `read_run` of the first, if it is read already.

    Returns:
        Condition -> comparison.

    Raises:
        ValueError: a folder without answers, or no question in common.
    """
    before = read_run(first) if before is None else before
    after = read_run(second)
    pairs = {name: (name, name) for name in before if name in after}
    if not pairs and len(before) == len(after) == 1:
        one, two = next(iter(before)), next(iter(after))
        pairs = {f"{one} against {two}": (one, two)}
    if not pairs:
        raise ValueError(
            f"no condition is in both runs: {first} has {', '.join(before)}, and {second} has {', '.join(after)}; "
            "evaluate both under one, such as the same --frames"
        )
    # The runs go by the shortest ends of their paths that differ: a/evaluation/mme and b/evaluation/mme.
    parts = [Path(folder).expanduser().resolve().parts for folder in (first, second)]
    longest = max(map(len, parts))
    count = next((n for n in range(1, longest) if parts[0][-n:] != parts[1][-n:]), 1)
    name, other = ("/".join(part[-count:]) for part in parts)
    results = read_results(first), read_results(second)
    compared = {}
    for condition, (one, two) in pairs.items():
        comparison = compare_records(name, before[one], other, after[two])
        compared[condition] = replace(comparison, differences=protocol_differences(*results, one, two))
    return compared


def read_run(folder: str | Path) -> RunRecords:
    """The answered questions of an evaluation by condition.

    Args:
        folder: of the evaluation, or of the training run that `test` evaluated.

    Raises:
        ValueError: it has no samples, or one id twice.
    """
    folder = Path(folder).expanduser()
    for place in (folder, folder / TEST_FOLDER):
        if (place / SAMPLES_FILE).is_file() and (conditions := read_samples(place)):
            return {name: _by_id(map(records_of, lines)) for name, lines in conditions.items()}
    if (folder / OLD_PREDICTIONS).is_file():
        return {"video": _by_id(by_question(read_jsonl(folder / OLD_PREDICTIONS)))}
    raise ValueError(f"{folder} has no {SAMPLES_FILE} of `evaluate` or `test`; name a run that came to its end")


def read_results(folder: str | Path) -> dict[str, Any]:
    """The content of an evaluation's results.json; empty where there is none yet."""
    folder = Path(folder).expanduser()
    files = [place / RESULTS_FILE for place in (folder, folder / TEST_FOLDER)]
    found = next((file for file in files if (file.parent / SAMPLES_FILE).is_file() and file.is_file()), None)
    return {} if found is None else json.loads(found.read_text(encoding="utf-8"))


def protocol_differences(before: Mapping[str, Any], after: Mapping[str, Any], one: str, two: str) -> list[str]:
    """What two evaluations did not ask alike, in words: a difference of their scores may come from it.

    Args:
        before: results.json of the first; what an earlier release did not write is not compared.
        after: results.json of the second.
        one: condition of the first.
        two: condition of the second.
    """
    sides = []
    for results, condition in ((before, one), (after, two)):
        asked = results.get("conditions", {}).get(condition, {})
        shown = asked.get("shown", {})
        fields = {"protocol": results.get("protocol", {}).get("name"), "sampling": results.get("sampling")}
        limits = results.get("budget")
        if limits is not None:  # the limit of answers is one of sampling, too
            limits = {name: value for name, value in limits.items() if name != "max_completion_tokens"}
        fields |= {"budget": limits, "reading": asked.get("reading"), "frames": shown.get("frames")}
        prompt = {f"question {shown['prompt_of']}": shown["prompt_sha256"]} if shown.get("prompt_sha256") else None
        sides.append({**fields, "prompt": prompt})
    first, second = sides
    known = [name for name in first if first[name] is not None and second[name] is not None]
    if "prompt" in known and first["prompt"].keys() != second["prompt"].keys():
        known.remove("prompt")  # of different questions
    return [text for name in known for text in changed_values(name, first[name], second[name])]


def changed_values(name: str, before: Any, now: Any) -> Iterator[str]:
    """Where two values of JSON differ, by the dotted names of their parts."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from changed_values(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        texts = [json.dumps(value, ensure_ascii=False) for value in (before, now)]
        one, other = (text if len(text) <= 60 else f"{text[:57]}..." for text in texts)
        yield f"{name} was {one}, is {other}"


def _by_id(questions: Iterable[Responses]) -> Records:
    by_id: dict[str, Responses] = {}
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
    common = []
    for name in before:
        one, other = before[name][0], after.get(name, [{}])[0]
        # Predictions of earlier releases have no hash.
        field = "doc_hash" if "doc_hash" in one and "doc_hash" in other else "answer"
        if one[field] == other.get(field):
            common.append(name)
    if not common:
        raise ValueError(
            f"{first} and {second} have no question in common that both answered; evaluate both on one data set"
        )
    strict, robust = {}, {}
    for category in (OVERALL, *sorted({before[name][0]["category"] for name in common} - {OVERALL})):
        ids = [name for name in common if category in (OVERALL, before[name][0]["category"])]
        pair = [before[name] for name in ids], [after[name] for name in ids]
        strict[category] = paired_difference(*pair)
        robust[category] = paired_difference(*pair, "correct_lenient")

    gains = question_gains([before[name] for name in common], [after[name] for name in common], "correct")
    won = [name for name, gain in zip(common, gains, strict=True) if gain > 0]
    lost = [name for name, gain in zip(common, gains, strict=True) if gain < 0]
    return Comparison(first, second, strict, robust, won, lost, len(before.keys() | after.keys()) - len(common))
