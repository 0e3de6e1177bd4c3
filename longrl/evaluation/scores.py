"""Accuracies with intervals from sample records (`longrl.evaluation.records`).

The unit is the question: where a run answered each several times, a question counts once, with the mean over its
completions.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

Record = Mapping[str, Any]
Responses = Sequence[Record]
"""The records of all completions of one question."""
Scores = Mapping[str, Mapping[str, Any]]
"""Category -> {"accuracy", "low", "high", "n"}, as in results.json."""
OVERALL = "overall"
RULE = "accuracy_by_rule"
"""Field of a record that the rule of a published protocol decides, in [0, 1]."""
GRADED: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "temporal_iou": ("mIoU", (0.3, 0.5, 0.7)),
    "box_iou": ("mIoU", (0.3, 0.5, 0.7)),
    "regression": ("mean", ()),
    "mra": ("MRA", ()),
    "ocr": ("mean", ()),
    "free_form": ("mean", ()),
}
"""Tasks whose answers are right by degrees -> the name of their mean, and the degrees k of R@k, from which an answer
counts (as Charades-STA, ActivityNet Captions and QVHighlights are reported)."""


@dataclass(frozen=True)
class Score:
    """Share of right answers with its 95% intervals."""

    accuracy: float
    low: float
    """Wilson interval, questions taken as independent."""
    high: float
    n: int
    """Questions."""
    cluster_low: float | None = None
    """The same with questions on one video taken as one cluster; never narrower than the plain one."""
    cluster_high: float | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The clustered interval if there is one, else the plain one."""
        if self.cluster_low is None or self.cluster_high is None:
            return self.low, self.high
        return self.cluster_low, self.cluster_high


@dataclass(frozen=True)
class Difference:
    """Accuracy of a second run minus that of a first on the same questions, with its 95% interval."""

    difference: float
    low: float
    high: float
    n: int
    won: int
    """Questions that the second run answers right more often, with one completion each: that only it answers right."""
    lost: int
    """Questions that the first run answers right more often."""


@dataclass(frozen=True)
class Summary:
    """Scores and rates of one run."""

    scores: dict[str, Score]
    """Strict: only an answer in its tag counts; `overall` and one entry per category."""
    lenient_scores: dict[str, Score]
    """The text after the thinking counts too when there is no tag."""
    format_rate: float
    truncation_rate: float
    """Share of completions cut off at the token limit."""
    majority_letter: str | None = None
    """The answer that most multiple-choice questions have; None without such questions."""
    majority_accuracy: float | None = None
    """Accuracy of always saying it on those questions."""
    answered: Score | None = None
    """Score of the multiple-choice answers that name an option; None without any. A model that knows nothing is at
    chance here, while one that often names none is below chance in `scores`."""
    breakdowns: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Field of the metadata -> its value -> strict score."""
    letters: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often each option is the right one ("answers") and is named ("predictions"; "none" where none is), over all
    completions to multiple-choice questions."""
    over_majority: Difference | None = None
    """Strict accuracy minus that of always saying `majority_letter`, on those questions: a policy that always says the
    same gains nothing."""
    graded: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)
    """Task whose answers are right by degrees -> "R@0.5", "mIoU" or "mean" -> `overall`, category -> strict score."""
    lenient_graded: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)
    """The same with the text after the thinking where there is no tag."""
    protocol_scores: dict[str, Score] = field(default_factory=dict)
    """By the rule of a published protocol: `overall` and one entry per category; empty without one."""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, for JSON."""
        return asdict(self)


def wilson_interval(correct: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927), which stays sensible at 0, at 1 and for small n.

    Args:
        correct: number of successes, 0 <= correct <= n.
        n: number of trials; 0 gives (0.0, 1.0).
        z: normal quantile, 1.96 for 95%.

    Returns:
        (low, high) in [0, 1].
    """
    if not 0 <= correct <= n:
        raise ValueError(f"correct must lie in 0..n, got {correct} of {n}")
    if n == 0:
        return 0.0, 1.0
    share, pull = correct / n, z * z / n
    center = (share + pull / 2) / (1 + pull)
    half = z * math.sqrt(share * (1 - share) / n + pull / (4 * n)) / (1 + pull)
    # The share lies within, whatever the rounding: charts draw what is between.
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))


def score(values: Sequence[float], clusters: Sequence[object] | None = None) -> Score:
    """Mean of values in [0, 1] with a plain and, given clusters, a cluster-aware Wilson interval.

    The cluster-aware one has n divided by the design effect (Kish 1965): the variance of the mean over clusters,
    relative to that of independent questions, taken as at least 1. Values between 0 and 1 vary less than those at the
    ends, for which the interval is meant: it is on the wide side.

    Args:
        values: [n] 1.0 for a right answer, or the share of right ones among several to a question.
        clusters: [n] what makes values dependent, the video for instance.
    """
    n = len(values)
    if n == 0:
        return Score(math.nan, 0.0, 1.0, 0)
    mean = sum(values) / n
    low, high = wilson_interval(sum(values), n)
    if clusters is None:
        return Score(mean, low, high, n)
    independent = mean * (1 - mean) / max(n - 1, 1)
    effect = max(1.0, _variance_of_mean(values, clusters) / independent) if independent > 0 else 1.0
    return Score(mean, low, high, n, *wilson_interval(sum(values) / effect, n / effect))


def macro_score(values: Sequence[float], strata: Sequence[object], clusters: Sequence[object] | None = None) -> Score:
    """Mean over strata (tasks) of the mean of each, which all count alike, with intervals as those of `score`.

    n is divided by what the unequal weights cost (Kish 1965), then by the design effect of the clusters: of one stratum
    this is `score`. A stratum with a single cluster says nothing of how clusters differ, so there deviations are from
    the mean of all.

    Args:
        values: [n] in [0, 1].
        strata: [n] the task of each.
        clusters: [n] what makes values dependent, the video for instance; it may have values of several strata.
    """
    n = len(values)
    if n == 0:
        return Score(math.nan, 0.0, 1.0, 0)
    counts = Counter(strata)
    weights = [1 / (len(counts) * counts[stratum]) for stratum in strata]
    within: dict[object, float] = defaultdict(float)
    for value, stratum in zip(values, strata, strict=True):
        within[stratum] += value / counts[stratum]
    mean = min(1.0, max(0.0, sum(within.values()) / len(counts)))
    num_alike = 1 / sum(weight * weight for weight in weights)
    low, high = wilson_interval(mean * num_alike, num_alike)
    if clusters is None:
        return Score(mean, low, high, n)
    clusters_of: dict[object, set[object]] = defaultdict(set)
    for stratum, cluster in zip(strata, clusters, strict=True):
        clusters_of[stratum].add(cluster)
    center = {stratum: within[stratum] if len(clusters_of[stratum]) > 1 else mean for stratum in counts}
    terms = [weight * (value - center[of]) for weight, value, of in zip(weights, values, strata, strict=True)]
    independent = mean * (1 - mean) / max(num_alike - 1, 1)
    effect = max(1.0, _variance_of_sum(terms, clusters) / independent) if independent > 0 else 1.0
    return Score(mean, low, high, n, *wilson_interval(mean * num_alike / effect, num_alike / effect))


def scores_by_category(records: Iterable[Record], field: str = "correct") -> dict[str, Score]:
    """Score of all questions under "overall" and of each category, in alphabetical order.

    Args:
        records: dicts with `id`, `category`, `video`, the field and, with several completions per question, `sample`.
        field: "correct" (strict), "correct_lenient" or "accuracy_by_rule".
    """
    questions = by_question(records)
    scores = {OVERALL: _score_questions(questions, field)}
    for name in sorted({str(question[0]["category"]) for question in questions} - {OVERALL}):
        scores[name] = _score_questions([question for question in questions if question[0]["category"] == name], field)
    return scores


def by_question(records: Iterable[Record]) -> list[Responses]:
    """Records with one id and different `sample` belong together; another one with both the same is a new question."""
    seen: Counter[tuple[object, int]] = Counter()
    questions: dict[object, list[Record]] = defaultdict(list)
    for record in records:
        completion = record["id"], record.get("sample", 0)
        questions[record["id"], seen[completion]].append(record)
        seen[completion] += 1
    return list(questions.values())


def graded_scores(records: Sequence[Record], field: str = "accuracy") -> dict[str, dict[str, dict[str, Score]]]:
    """What is reported of answers that are right by degrees, see `GRADED`; tasks without a record are left out.

    Args:
        records: as for `scores_by_category`.
        field: "accuracy" (strict) or "accuracy_lenient".

    Returns:
        Task -> "R@0.3", .., "mIoU" or "mean" -> `overall` and each category -> score.
    """
    graded: dict[str, dict[str, dict[str, Score]]] = {}
    for task, (name, degrees) in GRADED.items():
        own = [record for record in records if record["task"] == task and record.get(field) is not None]
        if not own:
            continue
        graded[task] = {}
        for degree in degrees:
            reached = [{**record, "reached": record[field] >= degree} for record in own]
            graded[task][f"R@{degree:g}"] = scores_by_category(reached, "reached")
        graded[task][name] = scores_by_category(own, field)
    return graded


def percent(score: Score) -> str:
    """A score with its clustered interval: "61.2 [55.0, 67.1]"."""
    low, high = score.interval
    return f"{100 * score.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def summarize(records: Sequence[Record]) -> Summary:
    """Everything reported of one run's records; at least one record."""
    if not records:
        raise ValueError("a summary needs at least one record, got none; check the evaluation data and its filters")
    questions = by_question(records)
    by_value: dict[str, dict[str, list[Responses]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        for name, value in question[0].get("breakdowns", {}).items():
            for one in [value] if isinstance(value, str) else value:  # a question of several kinds counts in each
                by_value[name][one].append(question)
    summary = Summary(
        scores=scores_by_category(records),
        lenient_scores=scores_by_category(records, "correct_lenient"),
        format_rate=sum(bool(record["format"]) for record in records) / len(records),
        truncation_rate=sum(record["finish_reason"] == "length" for record in records) / len(records),
        breakdowns={
            name: {value: _score_questions(values[value], "correct") for value in sorted(values)}
            for name, values in by_value.items()
        },
        graded=graded_scores(records),
        lenient_graded=graded_scores(records, "accuracy_lenient"),
        protocol_scores=scores_by_category(records, RULE)
        if all(record.get(RULE) is not None for record in records)
        else {},
    )
    choices = [question for question in questions if question[0]["task"] == "multiple_choice"]
    if not choices:
        return summary

    # What always saying one letter would score: of equally frequent ones the first.
    answers = Counter(str(question[0]["answer"]) for question in choices)
    letter, count = min(answers.items(), key=lambda item: (-item[1], item[0]))
    gains = [mean_of(question, "correct") - float(str(question[0]["answer"]) == letter) for question in choices]

    # A question counts as answered by those of its completions that name an option.
    completions = [record for question in choices for record in question]
    named = [[record for record in question if record["letter"]] for question in choices]
    letters = {
        "answers": Counter(str(record["answer"]) for record in completions),
        "predictions": Counter(record["letter"] or "none" for record in completions),
    }
    return replace(
        summary,
        majority_letter=letter,
        majority_accuracy=count / len(choices),
        over_majority=mean_difference(gains, [cluster_of(question) for question in choices]),
        answered=_score_questions([question for question in named if question], "correct") if any(named) else None,
        letters={name: dict(sorted(counts.items())) for name, counts in letters.items()},
    )


def paired_difference(
    before: Sequence[Responses], after: Sequence[Responses], field: str = "correct", z: float = 1.96
) -> Difference:
    """Gain of a second run over a first on the same questions, much sharper than two separate intervals.

    Normal interval of the mean difference with the variance over clusters (videos); it has no width when all
    differences are equal.

    Args:
        before: [n] questions as the first run answered them.
        after: [n] the same ones in the same order, as the second did.
        field: `correct` or `correct_lenient`.
        z: normal quantile, 1.96 for 95%.
    """
    return mean_difference(question_gains(before, after, field), [cluster_of(question) for question in before], z)


def question_gains(before: Sequence[Responses], after: Sequence[Responses], field: str) -> list[float]:
    """Gain of each question, [n] between -1 and 1, from one run to another."""
    return [mean_of(second, field) - mean_of(first, field) for first, second in zip(before, after, strict=True)]


def mean_difference(gains: Sequence[float], clusters: Sequence[object], z: float = 1.96) -> Difference:
    """Mean of what questions gained, with its clustered normal interval.

    Args:
        gains: [n] between -1 and 1.
        clusters: [n] what makes them dependent, the video for instance.
        z: normal quantile, 1.96 for 95%.
    """
    mean = sum(gains) / len(gains) if gains else math.nan
    half = z * math.sqrt(_variance_of_mean(gains, clusters))
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return Difference(mean, max(-1.0, mean - half), min(1.0, mean + half), len(gains), won, lost)


def _score_questions(questions: Sequence[Responses], field: str) -> Score:
    unjudged = [str(record["id"]) for question in questions for record in question if record[field] is None]
    if unjudged:
        raise ValueError(
            f"every record needs a judged {field!r}, got None for {', '.join(unjudged[:5])}; score them first"
        )
    return score([mean_of(question, field) for question in questions], [cluster_of(question) for question in questions])


def mean_of(question: Responses, field: str) -> float:
    """Mean of a field over the completions of a question."""
    return sum(float(record[field]) for record in question) / len(question)


def cluster_of(question: Responses) -> str:
    """What makes a question depend on others: its video, or itself where it has none."""
    record = question[0]
    return record["video"] or f"id:{record['id']}"  # a question without a video stands alone


def _variance_of_mean(values: Sequence[float], clusters: Sequence[object]) -> float:
    """C / (C - 1) * sum over C clusters of (sum of deviations)^2 / n^2: s^2 / n when each is its own cluster."""
    mean = sum(values) / len(values) if values else math.nan
    return _variance_of_sum([value - mean for value in values], clusters) / max(len(values), 1) ** 2


def _variance_of_sum(terms: Sequence[float], clusters: Sequence[object]) -> float:
    """C / (C - 1) * sum over C clusters of (sum of terms)^2, of terms whose sum is expected to be 0."""
    sums: dict[object, float] = defaultdict(float)
    for term, cluster in zip(terms, clusters, strict=True):
        sums[cluster] += term
    count = len(sums)
    if count < 2:
        return math.inf
    return count / (count - 1) * sum(d * d for d in sums.values())
