"""Rows of a scoreboard: what each condition of some evaluations scored, what it cost, and how it was asked."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longrl.evaluation.costs import COUNTED, MEASURED, OPERATIONS, costs_of, mean_costs
from longrl.evaluation.run_records import short_names
from longrl.evaluation.samples import RESULTS_FILE, SAMPLES_FILE, TEST_FOLDER, SampleLine, read_samples, records_of
from longrl.evaluation.scores import OVERALL, RULE, Score, scores_by_category
from longrl.evaluation.settings import Setting, setting_of
from longrl.evaluation.timings import read_command, read_timings

ScoreName = Literal["strict", "robust", "protocol"]
TOTAL = "total_flops"
"""Sum of `OPERATIONS`."""
COSTS = (*COUNTED, *MEASURED, *OPERATIONS, TOTAL)
FIELDS: Mapping[str, str] = {"strict": "scores", "robust": "lenient_scores", "protocol": "protocol_scores"}
"""Score -> its field in results.json."""
SCORE_WORDS: Mapping[str, str] = {"strict": "what stands in <answer>", "robust": "the whole answer"}
UNNAMED = "Test questions"
"""Title of questions that `test` alone has asked."""
LENGTH = "length of the video"
NUM_LENGTHS = 3
MAX_DEPTH = 4
"""Folders below a named one in which evaluations are looked for."""


@dataclass(frozen=True)
class ScoreboardRow:
    """A condition of an evaluation."""

    number: int
    """On the page, from 1."""
    run: str
    """Name of the evaluation's folder, as short as tells it apart."""
    condition: str
    benchmark: str
    """"" of `test`, which knows no benchmark."""
    results: Mapping[str, Any]
    """All of results.json."""
    asked: Mapping[str, Any]
    """What it has of this condition."""
    score_name: ScoreName
    scores: Mapping[str, Score]
    """`overall` and each category, by the score that the page shows."""
    groups: Mapping[str, Mapping[str, Score]]
    """Field of a breakdown, and the length of the video -> its value -> score."""
    costs: Mapping[str, Mapping[str, float] | None]
    """Name of `COSTS` -> `mean` of a question, `total` and `n`; None where nobody recorded it."""
    setting: Setting
    command: str | None = None

    @property
    def name(self) -> str:
        """Run and condition."""
        return f"{self.run}: {self.condition}"

    @property
    def blind(self) -> bool:
        """True if no media were shown."""
        return bool(self.asked.get("blind"))

    @property
    def overall(self) -> Score:
        """Of all questions."""
        return self.scores[OVERALL]

    @property
    def majority(self) -> float | None:
        """Accuracy of always saying the most frequent letter; None where no question has options."""
        return self.asked.get("majority_accuracy")

    def score_of(self, field_name: str) -> Score | None:
        """The overall score by a field of results.json; None without one."""
        found = (self.asked.get(field_name) or {}).get(OVERALL)
        return None if found is None else Score(**found)

    def cost(self, name: str) -> float | None:
        """Mean of a question."""
        found = self.costs.get(name)
        return None if found is None else found["mean"]


@dataclass(frozen=True)
class ScoreboardGroup:
    """Rows that answered the same questions."""

    title: str
    rows: Sequence[ScoreboardRow]
    names: tuple[str, ...] = ()
    """By which the benchmark is known."""

    @property
    def shown(self) -> list[ScoreboardRow]:
        """Those that were shown something."""
        return [row for row in self.rows if not row.blind]

    @property
    def blind(self) -> list[ScoreboardRow]:
        """The others."""
        return [row for row in self.rows if row.blind]

    @property
    def majority(self) -> float | None:
        """Accuracy of always giving the most frequent answer."""
        return next((row.majority for row in self.rows if row.majority is not None), None)


@dataclass(frozen=True)
class _Evaluation:
    """A folder with results."""

    folder: Path
    name: str
    results: Mapping[str, Any]
    lines: Mapping[str, Sequence[SampleLine]] = field(default_factory=dict)


def find_evaluations(runs: Iterable[str | Path]) -> list[Path]:
    """The folders of evaluations that are named, or lie below those that are.

    Raises:
        ValueError: one has none.
    """
    found: list[Path] = []
    for run in map(Path, runs):
        below = (run.glob("/".join(["*"] * depth + [RESULTS_FILE])) for depth in range(1, MAX_DEPTH + 1))
        places = [run, run / TEST_FOLDER]
        folders = [place for place in places if _is_evaluation(place)]
        folders = folders or sorted(path.parent for path in itertools.chain(*below) if _is_evaluation(path.parent))
        if not folders:
            raise ValueError(
                f"{run} has no results of `evaluate` or `test` ({RESULTS_FILE} and {SAMPLES_FILE}), nor has a folder "
                "in it; name an evaluation that came to its end"
            )
        found += folders
    return list({path.resolve(): path for path in found}.values())


def _is_evaluation(folder: Path) -> bool:
    return (folder / RESULTS_FILE).is_file() and (folder / SAMPLES_FILE).is_file()


def read_groups(folders: Sequence[Path], score_name: ScoreName = "strict") -> list[ScoreboardGroup]:
    """The rows of evaluations, by the questions that they answered; numbered from 1, the best first.

    Args:
        folders: of `find_evaluations`.
        score_name: which score the page shows; an evaluation without one of its protocol shows the strict one.

    Raises:
        ValueError: no question was answered.
    """
    names = run_names(folders)
    evaluations: dict[str, list[_Evaluation]] = {}
    for folder, name in zip(folders, names, strict=True):
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        one = _Evaluation(folder, name, results, read_samples(folder))
        key = results.get("questions", {}).get("fingerprint") or results.get("benchmark", name)
        evaluations.setdefault(key, []).append(one)
    numbers = itertools.count(1)
    groups = []
    for of_questions in evaluations.values():
        lengths = length_groups(line for one in of_questions for lines in one.lines.values() for line in lines)
        rows = [row for one in of_questions for row in _rows(one, score_name, lengths)]
        rows.sort(key=lambda row: (row.blind, -row.overall.accuracy))
        if rows:
            numbered = [ScoreboardRow(**{**vars(row), "number": next(numbers)}) for row in rows]
            groups.append(_group(numbered))
    if not groups:
        raise ValueError(f"no question has a score in {', '.join(map(str, folders))}; look at their reports")
    return groups


def run_names(folders: Sequence[Path]) -> list[str]:
    """Names of evaluations by what tells their folders apart: of a/evaluation and b/evaluation `a` and `b`."""
    parts = [name.split("/") for name in short_names([_run_of(folder) for folder in folders])]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({name[-1] for name in parts}) == 1:
        parts = [name[:-1] for name in parts]
    return ["/".join(name) for name in parts]


def _run_of(folder: Path) -> Path:
    return folder.parent if folder.name == TEST_FOLDER else folder


def _group(rows: Sequence[ScoreboardRow]) -> ScoreboardGroup:
    names = tuple(dict.fromkeys(row.benchmark for row in rows if row.benchmark))
    return ScoreboardGroup(" / ".join(names) or UNNAMED, rows, names)


def _rows(one: _Evaluation, score_name: ScoreName, lengths: Mapping[str, str]) -> Iterable[ScoreboardRow]:
    timings = read_timings(one.folder)
    for condition, asked in one.results["conditions"].items():
        used = score_name if asked.get(FIELDS[score_name]) else "strict"
        scores = {name: Score(**score) for name, score in (asked.get(FIELDS[used]) or {}).items()}
        if OVERALL not in scores:
            continue  # nothing was answered
        lines = one.lines.get(condition, [])
        answered = [line for line in lines if "resps" in line]
        rule = (one.results.get("protocol") or {}).get("rule_name")
        measured = [timings.get((condition, line["doc_id"]), {}) for line in answered]
        groups = _breakdowns(asked, lines, used)
        by_length = _scores_by_length(lines, lengths, used)
        yield ScoreboardRow(
            number=0,
            run=one.name,
            condition=condition,
            benchmark="" if one.folder.name == TEST_FOLDER else one.results.get("benchmark", ""),
            results=one.results,
            asked=asked,
            score_name=used,
            scores=scores,
            groups=groups | ({LENGTH: by_length} if by_length and "duration" not in groups else {}),
            costs=_mean_costs(answered, measured, bool(asked.get("blind"))),
            setting=setting_of(one.results, condition, SCORE_WORDS.get(used, rule)),
            command=read_command(one.folder),
        )


def _mean_costs(
    lines: Sequence[SampleLine], measured: Sequence[Mapping[str, Any]], blind: bool
) -> dict[str, Mapping[str, float] | None]:
    costs = []
    for line, of_line in zip(lines, measured, strict=True):
        counted = costs_of(line, blind)
        operations = [value for name in OPERATIONS if (value := counted[name]) is not None]
        total = sum(operations) if len(operations) == len(OPERATIONS) else None
        costs.append(counted | {name: of_line.get(name) for name in MEASURED} | {TOTAL: total})
    means = mean_costs(costs)
    return {name: means.get(name) for name in COSTS}


# ---- length of videos ----


def length_groups(lines: Iterable[SampleLine]) -> dict[str, str]:
    """Question, by its `doc_hash` -> words for the length of its video: three groups of as many questions, short first.

    Empty where lengths are not recorded or all alike. A question that was asked blind has the length that another
    condition knows.
    """
    seconds = {line["doc_hash"]: max(line["video_s"]) for line in lines if line.get("video_s")}
    ordered = sorted(seconds.values())
    bounds = sorted({ordered[len(ordered) * part // NUM_LENGTHS] for part in range(1, NUM_LENGTHS)}) if ordered else []
    bounds = [bound for bound in bounds if ordered[0] < bound]
    if not bounds:
        return {}
    names = [f"below {_duration(bounds[0])}"]
    names += [f"{_duration(low)} to {_duration(high)}" for low, high in itertools.pairwise(bounds)]
    names.append(f"from {_duration(bounds[-1])}")
    by_length = sorted(seconds.items(), key=lambda item: item[1])
    return {key: names[sum(value >= bound for bound in bounds)] for key, value in by_length}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _scores_by_length(
    lines: Sequence[SampleLine], lengths: Mapping[str, str], score_name: ScoreName
) -> dict[str, Score]:
    scores = _scores_by(lines, lambda line: lengths.get(line["doc_hash"]), score_name)
    return {name: scores[name] for name in dict.fromkeys(lengths.values()) if name in scores}


# ---- scores by what else ----


def _breakdowns(
    asked: Mapping[str, Any], lines: Sequence[SampleLine], score_name: ScoreName
) -> dict[str, Mapping[str, Score]]:
    """Scores by fields of the rows: results.json has the strict ones, others are counted from the answers."""
    groups: dict[str, Mapping[str, Score]] = {}
    for name, by_value in (asked.get("breakdowns") or {}).items():
        scores = {value: Score(**score) for value, score in by_value.items()}
        if score_name != "strict":
            counted = _scores_by(lines, _breakdown(name), score_name)
            scores = {value: counted[value] for value in scores if value in counted}
        groups[name] = scores
    return groups


def _breakdown(name: str) -> Callable[[SampleLine], str | Sequence[str] | None]:
    return lambda line: line["breakdowns"].get(name)


def _scores_by(
    lines: Sequence[SampleLine], value_of: Callable[[SampleLine], str | Sequence[str] | None], score_name: ScoreName
) -> dict[str, Score]:
    """Scores of the questions of each value; those without one are left out, those of several count in each."""
    correct = {"strict": "correct", "robust": "correct_lenient", "protocol": RULE}[score_name]
    answered = [(line, records_of(line)) for line in lines]
    records = [
        {**record, "category": value}
        for line, of_line in answered
        if of_line and (given := value_of(line)) is not None
        for value in ([given] if isinstance(given, str) else given)
        for record in of_line
    ]
    if not records or any(record.get(correct) is None for record in records):
        return {}
    return scores_by_category(records, correct)
