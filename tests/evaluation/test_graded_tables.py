"""Tables of answers that are right by degrees."""

import io

from rich.console import Console

from longrl.evaluation.graded_tables import TABLE_WIDTH, graded_tables
from longrl.evaluation.scores import summarize
from tests.evaluation.test_scores import record


def printed(records) -> list[str]:
    console = Console(file=io.StringIO(), width=TABLE_WIDTH)
    for table in graded_tables("video", summarize(records)):
        console.print(table)
    return console.file.getvalue().splitlines()


def test_a_grounding_table_has_a_row_for_each_category_and_one_for_robust():
    records = [
        record(str(n), n > 1, category="ab"[n % 2], task="temporal_iou", accuracy=n / 4, accuracy_lenient=1.0)
        for n in range(4)
    ]
    lines = printed(records)
    head = next(line for line in lines if "mIoU" in line)
    assert all(name in head for name in ("video: temporal_iou", "R@0.3", "R@0.5", "R@0.7", "mIoU"))
    rows = {line.split("\u2502")[1].strip(): line for line in lines if line.startswith("\u2502")}
    assert list(rows) == ["overall", "a", "b", "overall, robust"]
    assert "50.0 [" in rows["overall"]
    assert "37.5 [" in rows["overall"]
    assert rows["overall, robust"].count("100.0 [") == 4


def test_answers_that_are_right_or_wrong_have_no_table():
    assert printed([record("1", True)]) == []
