"""Means over tasks, scores of groups, and submissions: by hand, and as an evaluation writes them."""

import itertools
import json
import logging
import random

import pytest

from longrl.evaluation.averages import QuestionGroups, average_scores, check_averages
from longrl.evaluation.group_scores import video_mme_v2
from longrl.evaluation.scores import macro_score, score, wilson_interval
from longrl.evaluation.submissions import egoschema, longvideobench, mlvu
from longrl.types import Row
from tests.evaluation.scripted import benchmark, evaluated, evaluation, records

PREFIX = "--data.row_function=tests.evaluation.test_averages."


def test_a_mean_over_tasks_counts_every_task_alike():
    """Task a: 3 of 4; task b: 0 of 1; task c: half of 2. Plain: 4 of 7."""
    values, tasks = [1, 1, 1, 0, 0, 1, 0], list("aaaabcc")
    found = macro_score(values, tasks)
    assert found.accuracy == pytest.approx((3 / 4 + 0 + 1 / 2) / 3)
    # Weights 1/12, 1/3 and 1/6: as many questions as 1 / (4/144 + 1/9 + 2/36) alike ones.
    alike = 1 / (4 / 144 + 1 / 9 + 2 / 36)
    assert (found.low, found.high) == pytest.approx(wilson_interval(found.accuracy * alike, alike))
    assert (found.n, found.cluster_low) == (7, None)


def test_one_task_is_a_plain_mean_with_the_same_intervals():
    values, clusters = [1, 0, 1, 1, 0.5, 0, 1, 1], list("xxxyyzzz")
    one, plain = macro_score(values, ["t"] * 8, clusters), score(values, clusters)
    for name in ("accuracy", "low", "high", "n", "cluster_low", "cluster_high"):
        assert getattr(one, name) == pytest.approx(getattr(plain, name))


def test_the_clustered_interval_of_a_mean_over_tasks_holds_what_it_says():
    """Videos with one question of each of two tasks, both right or both wrong: the mean is that of the videos."""
    draw = random.Random(0)
    covered, plain_covered = 0, 0
    for _ in range(400):
        right = [float(draw.random() < 0.6) for _ in range(60)]
        values = [value for value in right for _ in range(2)]
        found = macro_score(values, ["a", "b"] * 60, [n // 2 for n in range(120)])
        low, high = found.interval
        covered += low <= 0.6 <= high
        plain_covered += found.low <= 0.6 <= found.high
    assert covered >= 0.93 * 400 > plain_covered


def test_a_task_on_one_video_does_not_hide_how_videos_differ():
    """Two tasks on one video each, all right and all wrong: by the videos, no less open than two questions alone."""
    found = macro_score([1.0] * 20 + [0.0] * 20, ["a"] * 20 + ["b"] * 20, ["v"] * 20 + ["w"] * 20)
    assert found.accuracy == pytest.approx(0.5)
    assert found.interval[0] <= wilson_interval(1, 2)[0] < wilson_interval(1, 2)[1] <= found.interval[1]


def logic(structure, *correct):
    rows = [Row(f"1-{n}", "?", "A", metadata={"group_type": "logic", "group_structure": structure}) for n in range(4)]
    return video_mme_v2(rows, [float(one) for one in correct])


def relevance(*correct):
    rows = [Row(f"1-{n}", "?", "A", metadata={"group_type": "relevance", "group_structure": "None"}) for n in range(4)]
    return video_mme_v2(rows, [float(one) for one in correct])


def test_consistent_answers_count_by_the_square_of_their_share():
    for correct in itertools.product((0, 1), repeat=4):
        assert relevance(*correct) == (sum(correct) / 4) ** 2


@pytest.mark.parametrize(
    ("structure", "correct", "sixteenths"),
    [
        ("[1, 2, 3, 4]", (1, 1, 0, 1), 4 / 16),
        ("[1, 2, 3, 4]", (0, 1, 1, 1), 0),
        ("[1, 2, 3, 4]", (1, 1, 1, 0), 9 / 16),
        ("[1, [2, 3], 4]", (1, 0, 1, 1), 4 / 12),  # of two steps without order the second holds alone
        ("[1, [2, 3], 4]", (1, 1, 0, 1), 4 / 12),
        ("[1, [2, 3], 4]", (1, 1, 1, 0), 7 / 12),
        ("[1, [2, 3], 4]", (0, 0, 1, 1), 0),
        ("[[1, 2], 3, 4]", (0, 1, 1, 1), 1 / 10),
        ("[[1, 2], 3, 4]", (1, 1, 0, 0), 2 / 10),
        ("[[1, 2], 3, 4]", (1, 1, 1, 0), 5 / 10),
        ("[[1, 2], 3, 4]", (1, 1, 1, 1), 1),
    ],
)
def test_a_chain_counts_up_to_its_first_wrong_step(structure, correct, sixteenths):
    """Figures of `cal_logic` of Video-MME-v2 b24176a, whose 48 values all agree."""
    assert logic(structure, *correct) == pytest.approx(sixteenths)


def test_a_group_that_cannot_be_scored_says_why():
    with pytest.raises(ValueError, match="a group has 4 questions, got 1: 1-0"):
        video_mme_v2([Row("1-0", "?", "A")], [1.0])
    with pytest.raises(ValueError, match=r"group_structure must be one of \[1, 2, 3, 4\].*got '1, 2'"):
        logic("1, 2", 1, 1, 1, 1)
    rows = [Row(f"1-{n}", "?", "A", metadata={"group_type": "odd"}) for n in range(4)]
    with pytest.raises(ValueError, match="group_type must be relevance or logic, got 'odd'"):
        video_mme_v2(rows, [1.0] * 4)


GROUPS = QuestionGroups("group", "longrl.evaluation.group_scores.video_mme_v2", by=["level"])


def grouped(video, kind="relevance", level=1, count=4):
    about = {"group": video, "video_id": video, "group_type": kind, "group_structure": "[1, 2, 3, 4]", "level": level}
    return [Row(f"{video}-{n}", "?\nA. x\nB. y", "A", category=f"task {n % 2}", metadata=about) for n in range(count)]


def answered(rows, *right):
    """Records of two completions to each question: all the first, and all the second."""
    return {
        index: [
            {"id": row.id, "sample": n, "category": row.category, "video": row.metadata["video_id"],
             **dict.fromkeys(("accuracy", "accuracy_lenient"), float(samples[index]))}
            for n, samples in enumerate(right)
        ]
        for index, row in enumerate(rows)
    }  # fmt: skip


def test_groups_are_scored_sample_by_sample_and_by_their_last_questions_level():
    rows = [*grouped("v"), *grouped("w", "logic", level=2)]
    judged = answered(rows, (1, 1, 0, 1, 1, 1, 0, 1), (1, 1, 1, 1, 0, 1, 1, 1))
    averages = average_scores(rows, judged, "category", GROUPS)
    assert list(averages) == ["mean over category", "groups", "groups, level 1", "groups, level 2"]
    of_v, of_w = (9 / 16 + 1) / 2, (4 / 16 + 0) / 2
    assert averages["groups"]["strict"].accuracy == pytest.approx((of_v + of_w) / 2)
    assert (averages["groups, level 1"]["strict"].accuracy, averages["groups"]["strict"].n) == (of_v, 2)
    assert averages["groups, level 2"]["robust"].accuracy == of_w
    assert averages["mean over category"]["strict"].accuracy == pytest.approx(((1 + 0.5 + 0.5 + 0.5) / 4 + 1) / 2)
    assert "rule" not in averages["groups"]
    # Without an answer to one of its questions a group has no score.
    del judged[7]
    assert average_scores(rows, judged, None, GROUPS)["groups"]["strict"].n == 1


def test_what_no_row_has_is_found_before_a_question_is_asked(caplog):
    rows = grouped("v")
    with pytest.raises(
        ValueError, match=r"protocol.mean_over=task is a field that no row has.* group, group_structure"
    ):
        check_averages(rows, "task", None)
    several = [Row("r", "?", "A", metadata={"kinds": ["a", "b"]})]
    with pytest.raises(ValueError, match=r"protocol.mean_over=kinds .* says several things.*breakdowns"):
        check_averages(several, "kinds", None)
    with pytest.raises(ValueError, match=r"protocol.groups.field=quartet is a field"):
        check_averages(rows, None, QuestionGroups("quartet", GROUPS.score))
    with pytest.raises(ValueError, match=r"1 of 1 groups .* the first, 'v': a group has 4 questions, got 3.*to null"):
        check_averages(rows[:3], "category", GROUPS)
    with caplog.at_level(logging.WARNING):
        check_averages([*rows, *grouped("w", count=2)], "category", GROUPS)
    assert "1 of 2 groups of questions cannot be scored; the first, 'w'" in caplog.text


# ---- as an evaluation has them ----


def group_row(record, index, media_root=None):
    from longrl.datamodules.rows.question_rows import longvideo_reason_row

    row = longvideo_reason_row(record, index, media_root)
    about = {
        "group": f"g{index // 4}",
        "video_id": f"v{index // 4}",
        "group_type": "relevance",
        "level": index // 4 + 1,
    }
    return Row(**{**vars(row), "category": f"task {index % 4 // 3}", "metadata": about})


def hidden_row(record, index, media_root=None):
    row = group_row(record, index, media_root)
    fields = {"answer": "hidden", "task": "open_ended", "metadata": {**row.metadata, "hidden_answer": True}}
    return Row(**{**vars(row), **fields})


def half_right(completion, row):
    return 0.0 if row.id.endswith("1") else 1.0


def test_an_evaluation_reports_averages_in_results_and_report(tmp_path):
    """Of each four answers `Mixed` has the first right with its tag; the first and the second without."""
    results = evaluated(
        tmp_path / "out", PREFIX + "group_row", '--protocol={"name": "p", "mean_over": "category", "groups": {"field": '
        '"group", "score": "longrl.evaluation.group_scores.video_mme_v2", "by": ["level"]}}', policy="Mixed",
    )  # fmt: skip
    averages = results["conditions"]["video"]["averages"]
    # Task 0 has three of four questions, of which one is right; task 1 the fourth, which was cut off.
    assert averages["mean over category"]["strict"]["accuracy"] == pytest.approx((1 / 3 + 0) / 2)
    assert averages["mean over category"]["robust"]["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert averages["groups"]["strict"]["accuracy"] == 1 / 16
    assert averages["groups, level 2"]["robust"]["accuracy"] == 4 / 16
    assert averages["groups"]["strict"]["n"] == 2
    assert averages["groups"]["strict"]["cluster_low"] <= averages["groups"]["strict"]["low"]
    assert results["protocol"]["groups"]["field"] == "group"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Averages of the protocol" in page
    assert "groups, level 2" in page
    assert "mean over category" in page


def test_results_without_averages_are_what_they_were(tmp_path):
    results = evaluated(tmp_path / "out")
    assert "averages" not in results["conditions"]["video"]
    assert results["protocol"].keys() == {"name", "source", "rule", "rule_name"}


def test_hidden_answers_are_sent_and_never_scored(tmp_path):
    out = tmp_path / "out"
    results = evaluated(
        out, PREFIX + "hidden_row", "--protocol.submission=longrl.evaluation.submissions.egoschema", says="Option B."
    )
    asked = records()
    sent = json.loads((out / "submission.json").read_text())
    assert sent == dict.fromkeys((str(record["problem_id"]) for record in asked), 1)
    condition = results["conditions"]["video"]
    assert condition["failures"] == {"hidden": len(asked)}
    assert condition["scores"] == {} == condition["scores_with_failures_as_wrong"]
    assert "answers are not released" in (out / "report.html").read_text()


def test_submissions_have_the_servers_forms():
    rows = [
        Row("q1", "?\nA. x\nB. y", "hidden", category="ego"),
        Row("q2", "?\nA. x\nB. y", "hidden", category="count"),
    ]
    answers = ["<think>A?</think>B", None]
    assert egoschema(rows, answers) == {"q1": 1, "q2": -1}
    assert longvideobench(rows, answers) == {"q1": "<think>A?</think>B", "q2": ""}
    assert mlvu(rows, answers) == [
        {"question_id": "q1", "question_type": "ego", "option": "B"},
        {"question_id": "q2", "question_type": "count", "option": ""},
    ]


def test_names_that_lead_nowhere_are_refused_before_a_question_is_asked(tmp_path):
    for option, value in (("submission", "longrl.nothing"), ("mean_over", "nothing")):
        with pytest.raises(ValueError, match=f"protocol.{option}"):
            evaluation(tmp_path / option, f"--protocol.{option}={value}").run()
        assert not (tmp_path / option / "answers").exists()


def test_a_question_of_two_kinds_counts_in_both(tmp_path):
    changed = [{**record, "metadata": {"kind": ["a", "b"] if n else ["a"]}} for n, record in enumerate(records()[:3])]
    results = evaluated(
        tmp_path / "out", "--breakdowns=[kind]", test=benchmark(tmp_path, changed), says="<answer>{gold}</answer>"
    )
    kinds = results["conditions"]["video"]["breakdowns"]["kind"]
    assert {name: (of["n"], of["accuracy"]) for name, of in kinds.items()} == {"a": (3, 1.0), "b": (2, 1.0)}
