"""Documents of lmms-eval tasks: one of every task with videos, by the fields that its code reads."""

from pathlib import Path

import pytest

from longrl.datamodules.rows.lmms_eval import lmms_eval_row
from longrl.datamodules.rows.question_rows import make_rows
from longrl.types import Row
from tests.datamodules.rows.lmms_eval_documents import BY_JUDGE, BY_RULE, INLINE, NOT_READ, OPTIONS
from tests.runs import ROOT


def row_of(document, root="/m") -> Row:
    (row,) = make_rows([document], lmms_eval_row, root)
    assert isinstance(row, Row), row
    return row


@pytest.mark.parametrize("task", BY_RULE)
def test_documents_that_a_rule_scores(task):
    document, expected = BY_RULE[task]
    row = row_of(document)
    assert (row.task, row.answer) == expected
    assert row.videos
    if row.task == "multiple_choice":
        assert row.problem.removeprefix("<video>\n") == INLINE
    sample = row_of({"doc_id": 5, "doc": document, "target": "x", "resps": [["B"]]})
    assert (sample.problem, sample.answer, sample.videos) == (row.problem, row.answer, row.videos)


@pytest.mark.parametrize("task", BY_JUDGE)
def test_documents_that_a_judge_scores(task):
    row = row_of(BY_JUDGE[task])
    assert (row.task, row.problem) == ("open_ended", "What falls?")
    assert "plate" in row.answer
    assert row.videos or row.images


@pytest.mark.parametrize("task", NOT_READ)
def test_documents_without_a_question_and_its_answer_are_errors(task):
    (error,) = make_rows([NOT_READ[task][0]], lmms_eval_row, None)
    assert isinstance(error, ValueError)


def test_the_table_says_which_tasks_fit():
    """docs/benchmarks.md has the counts and the names of these documents."""
    fit, judged, others = len(BY_RULE), len(BY_JUDGE), len(NOT_READ)
    assert fit + judged + others == 72
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"{fit + judged} of {fit + judged + others}" in text
    table = {}
    for line in text.partition("`lmms_eval_row`\n")[2].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 2:
            table[cells[0]] = cells[1]
    assert {name.strip() for name in table[f"by a rule ({fit})"].split(",")} == set(BY_RULE)
    assert {name.strip() for name in table[f"by a judge ({judged})"].split(",")} == set(BY_JUDGE)
    assert {name: table[name] for name in NOT_READ} == {name: why for name, (_, why) in NOT_READ.items()}


# ---- what the documents above do not show ----


def test_media_of_a_document():
    several = row_of(BY_RULE["av_odyssey"][0])
    assert (several.videos, several.audios) == (("/m/a.mp4", "/m/b.mp4"), ("/m/a.wav",))
    assert row_of(BY_RULE["av_speakerbench"][0]).audios == ()  # the video's own track
    assert row_of(BY_JUDGE["worldvqa"]).images == ("/m/w.jpg",)
    placed = {"question": f"<image><video>{INLINE}", "answer": "B", "video": "v.mp4", "ref_images": ["r.jpg"]}
    assert (row_of(placed).images, row_of(placed).videos) == (("/m/r.jpg",), ("/m/v.mp4",))
    assert row_of({**placed, "question": INLINE}).images == ()
    assert row_of({"question": INLINE, "answer": "B", "visual": ["v/1.png"]}).images == ("/m/v/1.png",)
    assert row_of(BY_RULE["lemonade"][0]).metadata["span_s"] == [3.0, 9.0]
    assert "span_s" not in row_of({**placed, "start": 1.0, "end": 3.0}).metadata


def test_several_questions_of_a_document_are_rows_each():
    asked = [
        {"question": "What falls?", "options": OPTIONS, "answer": "B"},
        {"question": "Why?", "answer": "It slips."},
    ]
    document = {"video_id": "v", "duration": 9, "questions": [*asked, {"question": "Where?"}, 3]}
    rows = make_rows([document], lmms_eval_row, "/m")
    assert [row.id for row in rows[:2]] == ["0-0", "0-1"]
    assert [(row.task, row.videos, row.metadata["duration"]) for row in rows[:2]] == [
        ("multiple_choice", ("/m/v",), 9), ("open_ended", ("/m/v",), 9),
    ]  # fmt: skip
    assert "needs 'answer'" in str(rows[2])
    assert "must hold questions, got 3" in str(rows[3])
    nested = {"video": "v.mp4", "qa": {"question": "What falls?", "options": OPTIONS, "answer": 1}}
    assert row_of(nested).answer == "B"


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["a", "c", "b"], "c", "B"),  # a wording before a small letter
        (["B", "A", "C"], "A", "A"),  # a capital is a letter, as ever
        (["2", "3", "1"], "1", "C"),  # a wording before a place
        (["x", "y", "z"], "1", "B"),
        (["x", "y", "z"], "(b)", "B"),
        (["x", "y", "z"], "B: y", "B"),
        (["X.", "Y.", "Z."], "y", "B"),
        ([{"id": "A", "text": "x"}, {"id": "B", "text": "y"}], "B", "B"),
        ("{'A': 'x', 'B': 'y'}", "y", "B"),
        ('["x", "y"]', "B", "B"),
        ("A. x\nB. y", "B", "B"),
    ],
)
def test_options_and_answers_in_their_forms(options, answer, letter):
    row = row_of({"question": "Which?", "options": options, "answer": answer, "video": "v.mp4"})
    assert (row.answer, row.task) == (letter, "multiple_choice")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "D"}, "must be one of the options A, B, got 'D'"),
        ({"answer": None}, "needs 'answer'"),
        ({"answer": 7}, "option number 7"),
        ({"options": ["x", None, "y"]}, "an option before the last is null"),
        ({"question": "None"}, "needs 'question'"),
        ({"video": None}, "needs 'video'"),
    ],
)
def test_what_a_document_lacks_is_said(changes, message):
    document = {"question": "Which?", "options": ["x", "y"], "answer": "A", "video": "v.mp4", **changes}
    (error,) = make_rows([document], lmms_eval_row, None)
    assert message in str(error)


def test_yes_and_no_are_words_that_a_rule_compares():
    row = row_of({"question": "Is it on?", "answer": "Yes.", "video": "v.mp4"})
    assert (row.task, row.answer) == ("exact", "Yes.")
    assert Path(row.videos[0]).name == "v.mp4"
