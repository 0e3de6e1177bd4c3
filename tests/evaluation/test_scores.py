"""Intervals, categories, baselines and paired differences, by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from longrl.evaluation.scores import (
    Score,
    by_question,
    graded_scores,
    paired_difference,
    score,
    scores_by_category,
    summarize,
    wilson_interval,
)


def record(name: str, correct: bool, category: str = "temporal", video: str | None = None, **fields: object) -> dict:
    return {
        "id": name,
        "task": "multiple_choice",
        "category": category,
        "video": name if video is None else video,
        "answer": "B",
        "letter": "B" if correct else "A",
        "correct": correct,
        "correct_lenient": True,
        "format": correct,
        "finish_reason": "stop",
        **fields,
    }


def paired(before: list[dict], after: list[dict], **options: float):
    runs = [sorted(by_question(run), key=lambda question: question[0]["id"]) for run in (before, after)]
    return paired_difference(*runs, **options)


def test_wilson_interval_by_hand():
    # p = 0.5, n = 10, z = 2: center (0.5 + 0.2) / 1.4 = 0.5, half 2 * sqrt(0.025 + 0.01) / 1.4
    half = 2 * math.sqrt(0.035) / 1.4
    assert wilson_interval(5, 10, z=2) == pytest.approx((0.5 - half, 0.5 + half))
    # p = 0: (0, z^2 / (n + z^2))
    assert wilson_interval(0, 10, z=2) == pytest.approx((0.0, 4 / 14))
    assert wilson_interval(10, 10, z=2) == pytest.approx((10 / 14, 1.0))
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_agrees_with_a_published_value():
    # Newcombe 1998, table I: 81 of 263, 95%: 0.2553 to 0.3662
    assert wilson_interval(81, 263, z=1.959964) == pytest.approx((0.2553, 0.3662), abs=5e-5)


@given(n=st.integers(1, 10_000), data=st.data())
def test_wilson_interval_holds_the_share_and_mirrors(n, data):
    correct = data.draw(st.integers(0, n))
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1
    assert wilson_interval(n - correct, n) == pytest.approx((1 - high, 1 - low))


def test_more_successes_than_trials_is_an_error():
    with pytest.raises(ValueError, match=r"0\.\.n, got 3 of 2"):
        wilson_interval(3, 2)


def test_score_without_dependence_has_equal_intervals():
    result = score([1, 0, 1, 1, 0, 1], clusters=range(6))
    assert (result.cluster_low, result.cluster_high) == pytest.approx((result.low, result.high))
    assert score([1, 0]).cluster_low is None


def test_fully_dependent_clusters_count_once():
    # Four videos of five questions, all alike within a video: design effect = (C/(C-1) * C * 25 * 0.25 / 400)
    # over (0.25 / 19) = (4/3 * 0.0625) * 76 = 6.3333, so n is 20 / 6.3333.
    values, clusters = [1] * 10 + [0] * 10, [i // 5 for i in range(20)]
    result = score(values, clusters)
    effect = 19 / 3
    assert (result.cluster_low, result.cluster_high) == pytest.approx(wilson_interval(10 / effect, 20 / effect))
    assert result.cluster_low < result.low < result.high < result.cluster_high


def test_one_cluster_says_nothing_and_equal_answers_still_have_width():
    assert score([1, 0, 1], clusters=["v"] * 3).cluster_low == 0.0
    result = score([1, 1, 1], clusters=["a", "b", "b"])
    assert (result.low, result.high) == (result.cluster_low, result.cluster_high)
    assert result.low < 0.5


def test_scores_come_overall_and_by_category():
    records = [record("1", True), record("2", False), record("3", True, "spatial"), record("4", True, "spatial")]
    scores = scores_by_category(records)
    assert list(scores) == ["overall", "spatial", "temporal"]
    assert [(s.accuracy, s.n) for s in scores.values()] == [(0.75, 4), (1.0, 2), (0.5, 2)]
    assert isinstance(scores["overall"], Score)
    assert (scores["overall"].low, scores["overall"].high) == wilson_interval(3, 4)


def test_questions_on_one_video_are_one_cluster_and_those_without_video_are_not():
    alike = [record(str(i), i < 2, video="v" if i < 2 else "w") for i in range(4)]
    apart = [record(str(i), i < 2, video="") for i in range(4)]
    wide, narrow = scores_by_category(alike)["overall"], scores_by_category(apart)["overall"]
    assert wide.cluster_low < wide.low
    assert narrow.cluster_low == pytest.approx(narrow.low)


def test_an_unjudged_record_is_an_error():
    with pytest.raises(ValueError, match="judged 'correct', got None for 7"):
        scores_by_category([record("7", None)])


def test_summary_holds_strict_lenient_and_rates():
    records = [
        record("1", True),
        record("2", False, finish_reason="length"),
        record("3", False, answer="A"),
        record("4", False, task="numeric", answer="5"),
    ]
    summary = summarize(records)
    assert summary.scores["overall"].accuracy == 0.25
    assert summary.lenient_scores["overall"].accuracy == 1.0
    assert (summary.format_rate, summary.truncation_rate) == (0.25, 0.25)
    assert (summary.majority_letter, summary.majority_accuracy) == ("B", pytest.approx(2 / 3))
    assert summary.to_dict()["scores"]["overall"]["n"] == 4
    with pytest.raises(ValueError, match="at least one record"):
        summarize([])


def test_grounding_reports_recall_at_degrees_and_the_mean_overlap_by_category():
    overlaps = {"1": 0.2, "2": 0.35, "3": 0.5, "4": 0.9}
    records = [
        record(name, overlap >= 0.5, category="short" if name < "3" else "long", task="temporal_iou", answer="0-10",
               accuracy=overlap, accuracy_lenient=1.0)
        for name, overlap in overlaps.items()
    ]  # fmt: skip
    summary = summarize([*records, record("5", True)])
    measures = summary.graded["temporal_iou"]
    assert list(measures) == ["R@0.3", "R@0.5", "R@0.7", "mIoU"]
    assert [measures[name]["overall"].accuracy for name in measures] == pytest.approx([0.75, 0.5, 0.25, 1.95 / 4])
    assert [measures[name]["long"].accuracy for name in measures] == pytest.approx([1.0, 1.0, 0.5, 0.7])
    assert measures["mIoU"]["overall"].n == 4
    assert summary.lenient_graded["temporal_iou"]["mIoU"]["overall"].accuracy == 1.0
    assert list(summary.graded) == ["temporal_iou"]


def test_a_question_with_several_answers_counts_once_in_every_measure():
    records = [
        record("1", False, task="temporal_iou", sample=n, accuracy=overlap, accuracy_lenient=overlap)
        for n, overlap in enumerate((0.2, 0.6))
    ]
    measures = graded_scores(records)["temporal_iou"]
    assert [measures[name]["overall"].accuracy for name in measures] == pytest.approx([0.5, 0.5, 0.0, 0.4])


def test_other_answers_that_are_right_by_degrees_have_their_mean():
    records = [record(str(n), False, task="regression", accuracy=n / 4, accuracy_lenient=1.0) for n in range(4)]
    assert graded_scores(records)["regression"]["mean"]["overall"].accuracy == pytest.approx(0.375)
    assert graded_scores([record("1", True)]) == {}


def test_answers_that_name_no_option_are_left_out_of_what_was_answered():
    records = [record("1", True), record("2", False), record("3", False, letter=None), record("4", True, task="math")]
    answered = summarize(records).answered
    assert (answered.accuracy, answered.n) == (0.5, 2)
    assert summarize([record("1", False, letter=None)]).answered is None


def sampled(name: str, *correct: bool, **fields: object) -> list[dict]:
    """A question that was answered several times."""
    return [record(name, right, sample=n, **fields) for n, right in enumerate(correct)]


def test_a_question_answered_several_times_counts_once_with_its_mean():
    records = [*sampled("1", True, False, False, True), *sampled("2", False, False, False, True)]
    found = scores_by_category(records)["overall"]
    assert (found.accuracy, found.n) == (0.375, 2)
    assert (found.low, found.high) == wilson_interval(0.75, 2)
    assert (found.cluster_low, found.cluster_high) == (found.low, found.high)  # the questions are the units


def test_a_summary_of_several_completions_weighs_questions_not_completions():
    named = sampled("1", True, False, True) + sampled("2", False, False, True) + sampled("3", False, answer="A")
    named[1]["letter"] = named[3]["letter"] = named[4]["letter"] = None
    named[0]["finish_reason"] = "length"
    found = summarize(named)
    assert (found.scores["overall"].accuracy, found.scores["overall"].n) == (pytest.approx((2 / 3 + 1 / 3 + 0) / 3), 3)
    assert (found.answered.accuracy, found.answered.n) == (pytest.approx((1 + 1 + 0) / 3), 3)  # of those that name one
    assert (found.majority_letter, found.majority_accuracy) == ("B", pytest.approx(2 / 3))
    assert found.truncation_rate == pytest.approx(1 / 7)


def test_several_completions_pair_by_question():
    before = sampled("1", False, False) + sampled("2", True, True)
    after = sampled("2", True, False) + sampled("1", True, False)
    result = paired(before, after)
    assert (result.difference, result.n, result.won, result.lost) == (0.0, 2, 1, 1)
    assert paired(before, sampled("1", True) + sampled("2", True)).difference == 0.5  # of another number


def test_questions_with_one_id_stay_apart():
    """Joined sources may number their rows alike."""
    records = sampled("1", True, True) + sampled("1", False, False)
    assert scores_by_category(records)["overall"].n == 2


def test_majority_of_equals_is_the_first_letter():
    summary = summarize([record("1", True, answer="C"), record("2", True, answer="A")])
    assert (summary.majority_letter, summary.majority_accuracy) == ("A", 0.5)
    summary = summarize([record("1", True, task="math")])
    assert (summary.majority_letter, summary.majority_accuracy) == (None, None)


def test_paired_difference_by_hand():
    before = [record(str(i), i in (0, 1)) for i in range(4)]
    after = [record(str(i), i in (0, 2, 3)) for i in reversed(range(4))]
    # gains 0, -1, 1, 1: mean 0.25, s^2 = (0.0625 + 1.5625 + 0.5625 + 0.5625) / 3, variance of the mean s^2 / 4
    result = paired(before, after, z=1.0)
    half = math.sqrt(2.75 / 3 / 4)
    assert (result.difference, result.won, result.lost, result.n) == (0.25, 2, 1, 4)
    assert (result.low, result.high) == pytest.approx((0.25 - half, 0.25 + half))


def test_paired_difference_is_wider_when_gains_come_by_video():
    before = [record(str(i), False, video=str(i // 4)) for i in range(16)]
    after = [record(str(i), i < 8, video=str(i // 4)) for i in range(16)]
    alone = [{**item, "video": item["id"]} for item in before]
    clustered, plain = paired(before, after), paired(alone, after)
    assert clustered.high - clustered.low > 1.5 * (plain.high - plain.low)


# ---- against other ways to the same numbers ----


def bootstrap(values: list[float], clusters: list[int], draws: int = 4000) -> tuple[float, float]:
    """95% percentile interval of the mean when whole clusters are drawn with replacement."""
    generator = np.random.default_rng(0)
    sums = np.bincount(clusters, weights=values)
    sizes = np.bincount(clusters)
    drawn = generator.integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    return tuple(np.quantile(means, [0.025, 0.975]))


def answers(num_videos: int, share: float, alike: float, seed: int) -> tuple[list[float], list[int]]:
    """One to eight questions on each video, right with a probability that varies from video to video."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 9, num_videos)
    by_video = generator.beta(share * (1 / alike - 1), (1 - share) * (1 / alike - 1), num_videos)
    clusters = np.repeat(np.arange(num_videos), sizes)
    values = generator.random(len(clusters)) < by_video[clusters]
    return values.astype(float).tolist(), clusters.tolist()


@pytest.mark.parametrize(("num_videos", "share", "alike"), [(300, 0.5, 0.4), (300, 0.8, 0.4), (900, 0.65, 0.15)])
def test_cluster_intervals_are_those_of_a_bootstrap_over_videos(num_videos, share, alike):
    for seed in range(3):
        values, clusters = answers(num_videos, share, alike, seed)
        found, (low, high) = score(values, clusters), bootstrap(values, clusters)
        width = high - low
        assert found.cluster_low == pytest.approx(low, abs=0.1 * width)
        assert found.cluster_high == pytest.approx(high, abs=0.1 * width)
        assert found.high - found.low < 0.95 * width  # what questions taken as independent would say


def test_intervals_of_a_paired_difference_are_those_of_a_bootstrap_over_videos():
    values, clusters = answers(300, 0.5, 0.4, seed=7)
    generator = np.random.default_rng(1)
    later = [float(generator.random() < 0.7) if generator.random() < 0.3 else value for value in values]
    rows = [[record(str(n), bool(v), video=str(c)) for n, (v, c) in enumerate(zip(run, clusters, strict=True))]
            for run in (values, later)]  # fmt: skip
    found = paired(*rows)
    low, high = bootstrap([b - a for a, b in zip(values, later, strict=True)], clusters)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_cluster_interval_holds_the_truth_about_as_often_as_it_says():
    held = plain = 0
    for seed in range(400):
        found = score(*answers(60, 0.6, 0.4, seed))
        held += found.cluster_low <= 0.6 <= found.cluster_high
        plain += found.low <= 0.6 <= found.high
    assert 0.92 <= held / 400 <= 0.98
    assert plain / 400 < 0.88


def test_always_b_on_the_published_answer_key_is_shown_as_no_better_than_the_majority():
    """LongVideo-Reason-eval: of 1000 answers 441 are B (reference of the set: 299 C, 153 A, 107 D)."""
    key = "B" * 441 + "C" * 299 + "A" * 153 + "D" * 107
    summary = summarize([record(str(n), gold == "B", answer=gold, letter="B") for n, gold in enumerate(key)])
    assert (summary.majority_letter, summary.majority_accuracy) == ("B", 0.441)
    assert summary.scores["overall"].accuracy == summary.majority_accuracy
    assert summary.scores["overall"].low < summary.majority_accuracy
