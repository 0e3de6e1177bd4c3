"""Records of benchmarks with holes and slips: an error that names the record and what is wrong, or what is meant."""

import pytest

from longrl.datamodules import rows as schemas
from longrl.datamodules.rows.question_rows import make_rows
from longrl.datamodules.rows.sources import read_records
from longrl.types import Row
from tests.datamodules.rows import benchmark_records as records, released_questions as released

LETTERED = {"A": "a", "B": "", "C": "c", "D": "d"}
CG_BENCH = {
    "qid": 1, "video_uid": "v", "question": "Who?", "choices": ["a", "b"], "right_answer": "B",
    "clue_intervals": [[1, 2]], "duration": 600,
}  # fmt: skip
VSI = records.vsi_bench("route_planning", "A")
MMMU = {"id": "dev_Art_1", "question": "Which?", "options": ["a", "b"], "answer": "B"}
MMVU = {
    "id": "1", "video": "videos/Art/1.mp4", "question_type": "multiple-choice", "question": "Which?",
    "choices": {"A": "a", "B": "b"}, "answer": "B",
}  # fmt: skip
TIMELENS = {"record_name": "A1B2C", "queries": ["he sits", "he stands"], "spans": [[1, 2], [3, 4]]}
CHARADES = {"video": "A1B2C.mp4", "caption": "he sits", "timestamp": [1, 2]}
LETTERS_SHIFT = r"an option before the last is null"
NO_LIST = r"options must be a list of wordings"


@pytest.mark.parametrize(
    ("function", "record", "problem"),
    [
        # Nobody knows what the letters behind an empty option mean.
        ("lvbench_rows", {"key": "v", "question": "Who?", "options": ["a", None, "c"], "answer": "C"}, LETTERS_SHIFT),
        ("mmvu_row", MMVU | {"choices": LETTERED}, LETTERS_SHIFT),
        ("mmvu_row", MMVU | {"choices": {"A": "a", "C": "c"}}, "lettered from A on without a gap, got A, C"),
        ("mmvu_row", MMVU | {"choices": ["a", "b"]}, "options must be by letter"),
        ("mmvu_row", MMVU | {"choices": None}, "needs 'choices'"),
        ("video_holmes_row", released.video_holmes(Options=LETTERED), LETTERS_SHIFT),
        ("cg_bench_grounding_row", CG_BENCH | {"choices": ["a", None, "b"]}, LETTERS_SHIFT),
        # A text is no list of its characters.
        ("lvbench_rows", {"key": "v", "question": "Who?", "options": "(A) a (B) b", "answer": "B"}, NO_LIST),
        ("vsi_bench_row", VSI | {"options": "['A. x', 'B. y']"}, NO_LIST),
        ("mlvu_row", released.mlvu(candidates="ab", answer="b"), NO_LIST),
        ("canonical_row", {"video": "v", "question": "Who?", "options": {"A": "a"}, "answer": "A"}, NO_LIST),
        ("mlvu_row", released.mlvu(candidates=None), "needs 'candidates'"),
        ("cg_bench_long_row", CG_BENCH | {"choices": None}, "needs 'choices'"),
        ("cg_bench_clue_row", CG_BENCH | {"clue_intervals": [["a", "b"]]}, r"\(qid 1\): 'clue_intervals' must be"),
        ("cg_bench_clue_row", CG_BENCH | {"clue_intervals": [[1, float("inf")]]}, "'clue_intervals' must be"),
        ("mvbench_row", released.mvbench(start="x"), r"'start' must lie before 'end', got 'x'"),
        ("ego_schema_row", released.ego_schema(answer="\u00b2"), "'answer' must be the place of an option"),
        ("temp_compass_rows", released.temp_compass("yes_no") | {"answer": "maybe"}, "'answer' must be yes or no"),
        ("temp_compass_rows", released.temp_compass("caption_matching") | {"answer": "B"}, "must be 'Caption A: ..'"),
        ("timelens_rows", TIMELENS | {"spans": [[1, 2]]}, "'queries' and 'spans' must be as many.* got 2 and 1"),
        ("charades_sta_row", CHARADES | {"timestamp": "12"}, "between two increasing seconds, got '12'"),
        ("longvideobench_row", {"correct_choice": 1, "candidates": 5}, r"cannot be read .*data\.row_function"),
    ],
)  # fmt: skip
def test_a_slip_is_an_error_that_says_which_record_and_what(function, record, problem):
    (error,) = make_rows([record], getattr(schemas, function), None)
    with pytest.raises(ValueError, match=f"record 0.*{problem}"):
        raise error


def test_what_is_wrong_with_one_question_leaves_the_others_of_its_record():
    """The record is the third, whichever of its questions is broken."""
    good = {"question": "Is it?", "answer": "Yes"}
    compass = {"record_name": "v", "task_type": "yes_no", "action": [good, None], "order": None}
    timelens = {"video_path": "x/y.mp4", "events": [{"query": "he sits", "span": [[1, 2]]}, None]}
    for function, record in ((schemas.temp_compass_rows, compass), (schemas.timelens_rows, timelens)):
        row, error = make_rows([record] * 3, function, None)[-2:]
        assert isinstance(row, Row)
        assert str(error).startswith("record 2 cannot be read (AttributeError")


def test_what_can_be_meant_is_taken():
    holmes = released.video_holmes(Options={"B": "b", "A": "a"}, Answer="A")
    (row,) = make_rows([holmes], schemas.video_holmes_row, None)
    assert (row.problem.splitlines()[1:], row.answer) == (["A. a", "B. b"], "A")  # as lettered, not as listed
    (row,) = make_rows([VSI | {"options": ["A. x", "B. y", None]}], schemas.vsi_bench_row, None)
    assert row.metadata["asked"].splitlines()[-2:] == ["A. x", "B. y"]
    (row,) = make_rows([MMMU | {"options": ["a", "b", None]}], schemas.video_mmmu_perception_row, None)
    assert "None" not in row.metadata["asked"]
    (row,) = make_rows([MMMU | {"options": [], "answer": "['1,000', '24/7]"}], schemas.video_mmmu_perception_row, None)
    assert (row.answer, row.metadata["aliases"]) == ("1,000", ["24/7"])
    (row,) = make_rows([released.ego_schema(answer=1.0)], schemas.ego_schema_row, None)
    assert row.answer == "B"
    scene = released.mlvu(question_type="subPlot", scoring_points=["He sits.", None])
    (row,) = make_rows([scene], schemas.mlvu_row, None)
    assert row.answer == "- He sits."


def test_lines_end_where_lines_end(tmp_path):
    file = tmp_path / "charades.txt"
    file.write_bytes("A1B2C 0 6##he smiles\u2028 and\x85 sits.\r\n\r\nA1B2C 1 2##he stands.\r\n".encode())
    rows = make_rows(read_records(file), schemas.charades_sta_row, None)
    assert [row.metadata["asked"] for row in rows] == ["he smiles\u2028 and\x85 sits", "he stands"]


def test_a_table_with_a_cell_too_many_does_not_shift_the_others(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("id,video,question,answer\r\n1,v.mp4,What, who?,a dog\r\n2,v.mp4,Who?,a cat\r\n", newline="")
    error, row = make_rows(read_records(file), schemas.canonical_row, None)
    assert "record 0 has more cells than its table has columns" in str(error)
    assert (row.problem, row.answer) == ("Who?", "a cat")


def test_a_json_of_something_else_between_records_says_where(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"question": "Who?"}, 3]')
    with pytest.raises(ValueError, match=r"its record 1 \(from 0 on\) is 3: correct it, or take it out"):
        read_records(file)
