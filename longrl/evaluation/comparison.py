"""`python -m longrl compare RUN_A RUN_B`: what a second run gains over a first, question by question."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrl.evaluation.samples import FILE, read_samples, records_of
from longrl.evaluation.scores import OVERALL, Difference, by_question, paired_difference
from longrl.io.jsonl import read_jsonl

DESCRIPTION = """Compares two runs on the questions that both answered: the difference of their accuracies with its 95%
interval, clustered by video, which is much sharper than two separate intervals. A run is the folder of `evaluate`, or
of `test`."""
Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""Question id -> the records of its completions."""
NUM_SHOWN = 20


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


@dataclass(frozen=True)
class Comparisons:
    """All conditions that two runs share."""

    by_condition: dict[str, Comparison]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {name: dataclasses.asdict(found) for name, found in self.by_condition.items()}


def main(args: Sequence[str]) -> None:
    """Command line of `compare`."""
    parser = argparse.ArgumentParser(prog="python -m longrl compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("run_a", help="folder of the first run")
    parser.add_argument("run_b", help="folder of the second, whose gain is told")
    parser.add_argument("--out", help="write everything to this JSON file too")
    options = parser.parse_args(list(args))
    found = compare(options.run_a, options.run_b)
    show(found)
    if options.out:
        from longrl.commands.evaluate import write_json

        write_json(Path(options.out), found.to_dict())


def compare(first: str | Path, second: str | Path) -> Comparisons:
    """Compares the conditions that two runs share by name; or the only ones that are not blind.

    Raises:
        ValueError: a folder without answers, or no question in common.
    """
    return compare_runs(first, read_run(first), second, read_run(second))


def compare_runs(
    first: str | Path, before: Mapping[str, Records], second: str | Path, after: Mapping[str, Records]
) -> Comparisons:
    """`compare` of runs that are read already.

    Args:
        first: folder of the first run, for its name.
        before: what `read_run` told of it.
        second: folder of the second run.
        after: what `read_run` told of that.
    """
    pairs = {name: (name, name) for name in before if name in after}
    if not pairs:
        pairs = _only(before, after, first, second)
    names = _names(first, second)
    return Comparisons(
        {name: compared(names[0], before[one], names[1], after[two]) for name, (one, two) in pairs.items()}
    )


def _names(first: str | Path, second: str | Path) -> list[str]:
    """So much of the ends of two paths that they differ: a/evaluation/mme and b/evaluation/mme are told whole."""
    parts = [Path(folder).expanduser().resolve().parts for folder in (first, second)]
    longest = max(map(len, parts))
    count = next((n for n in range(1, longest) if parts[0][-n:] != parts[1][-n:]), 1)
    return ["/".join(own[-count:]) for own in parts]


def _only(before: Mapping[str, Any], after: Mapping[str, Any], first: Any, second: Any) -> dict[str, tuple[str, str]]:
    if len(before) != 1 or len(after) != 1:
        raise ValueError(
            f"no condition is in both runs: {first} has {', '.join(before)}, and {second} has {', '.join(after)}; "
            "evaluate both under one, such as the same --frames"
        )
    (one,), (two,) = before, after
    return {f"{one} against {two}": (one, two)}


def read_run(folder: str | Path) -> dict[str, Records]:
    """Condition -> answered questions of a run's folder.

    Raises:
        ValueError: it has neither the samples of `evaluate` nor the predictions of `test`, or one id twice.
    """
    folder = Path(folder).expanduser()
    if (folder / FILE).is_file():
        lines = read_samples(folder)
        return {name: _by_id([_marked(line) for line in found]) for name, found in lines.items()}
    if (folder / "predictions.jsonl").is_file():
        return {"video": _by_id(by_question(read_jsonl(folder / "predictions.jsonl")))}
    raise ValueError(
        f"{folder} has neither {FILE} of `evaluate` nor predictions.jsonl of `test`; name a run that came to its end"
    )


def _marked(line: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**record, "doc_hash": line["doc_hash"]} for record in records_of(line)]


def _by_id(questions: Sequence[Sequence[Mapping[str, Any]]]) -> Records:
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for records in questions:
        if records and records[0]["id"] in found:
            raise ValueError(f"two runs are compared by their questions' ids, but {records[0]['id']!r} is there twice")
        if records:
            found[records[0]["id"]] = records
    return found


def compared(first: str, before: Records, second: str, after: Records) -> Comparison:
    """The gain of the second over the first on the questions that both answered.

    Raises:
        ValueError: there are none.
    """
    common = [name for name in before if name in after and _same(before[name][0], after[name][0])]
    if not common:
        raise ValueError(
            f"{first} and {second} have no question in common that both answered; evaluate both on one data set"
        )
    gains = {name: _share(after[name]) - _share(before[name]) for name in common}
    return Comparison(
        first,
        second,
        _differences(before, after, common, "correct"),
        _differences(before, after, common, "correct_lenient"),
        won=[name for name in common if gains[name] > 0],
        lost=[name for name in common if gains[name] < 0],
        left_out=len(before.keys() | after.keys()) - len(common),
    )


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two questions of one id are one; runs of `test` tell no hash."""
    known = "doc_hash" in one and "doc_hash" in other
    return one["doc_hash"] == other["doc_hash"] if known else one["answer"] == other["answer"]


def _share(records: Sequence[Mapping[str, Any]]) -> float:
    return sum(record["correct"] for record in records) / len(records)


def _differences(before: Records, after: Records, ids: Sequence[str], field: str) -> dict[str, Difference]:
    categories = sorted({before[name][0]["category"] for name in ids} - {OVERALL})
    groups = {OVERALL: ids} | {
        category: [name for name in ids if before[name][0]["category"] == category] for category in categories
    }
    return {category: _difference(before, after, own, field) for category, own in groups.items()}


def _difference(before: Records, after: Records, ids: Sequence[str], field: str) -> Difference:
    first, second = ([record for name in ids for record in run[name]] for run in (before, after))
    return paired_difference(first, second, field)


def show(found: Comparisons) -> None:
    """The table, and the questions that changed."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)
    for condition, item in found.by_condition.items():
        table = Table(
            "", "strict", "robust", "n", "won", "lost", title=f"{item.second} minus {item.first} ({condition})"
        )
        for category, strict in item.strict.items():
            cells = [points(strict), points(item.robust[category]), *map(str, (strict.n, strict.won, strict.lost))]
            table.add_row(category, *cells)
        console.print(table)
        for text, ids in (("won", item.won), ("lost", item.lost)):
            if ids:
                more = f" and {len(ids) - NUM_SHOWN} more" if len(ids) > NUM_SHOWN else ""
                console.print(f"{text}: {', '.join(ids[:NUM_SHOWN])}{more}", highlight=False)
        if item.left_out:
            console.print(f"{item.left_out} questions are left out: only one run answered them, or they differ")


def points(difference: Difference) -> str:
    """A difference in percentage points with its interval: "+3.1 [-0.4, +6.6]"."""
    return f"{100 * difference.difference:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
