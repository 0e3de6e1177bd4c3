"""What the report of an evaluation shows beside its scores."""

import pytest

from longrl.evaluation.benchmark_report import cards, sample_card
from longrl.types import Row


def line(name: str, text: str, **more) -> dict:
    return {
        "id": name, "error": None, "resps": [[text]], "correct": [True], "rewards": [{"accuracy": 1.0}],
        "num_completion_tokens": [3], "finish_reason": ["stop"], **more,
    }  # fmt: skip


def test_a_card_is_made_from_the_lines_of_several_runs(tmp_path):
    row = Row("1", "Which?", "B", category="spatial", videos=(str(tmp_path / "gone.mp4"),))
    card = sample_card(row, {"sft": line("1", "x"), "rl": line("1", "y")})
    assert [(run, shown["resps"]) for run, shown in card.lines.items()] == [("sft", [["x"]]), ("rl", [["y"]])]
    assert (card.row, card.frames) == (row, None)
    with pytest.raises(ValueError, match="shows one question, '1', got"):
        sample_card(row, {"sft": line("1", "x"), "rl": line("2", "y")})


def test_cards_are_of_questions_that_all_conditions_answered_one_of_each_category_first():
    rows = [Row(str(n), "?", "A", category="xxxy"[n]) for n in range(4)]
    lines = [
        line(str(n), "x", doc_id=n, condition=condition, error="decode" if (n, condition) == (0, "b") else None)
        for condition in "ab"
        for n in range(4)
    ]
    chosen = cards(rows, lines, 2)
    assert sorted(card.row.category for card in chosen) == ["x", "y"]
    assert "0" not in [card.row.id for card in cards(rows, lines, 9)]
    assert cards(rows, lines, 2) == chosen
