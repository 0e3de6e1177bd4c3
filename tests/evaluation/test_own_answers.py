"""A run's own answers as records: which are taken, and that the data module reads them to the letter."""

import json
from collections import Counter

import pytest

from longrl.commands.main import main
from longrl.datamodules.rows import longvideo_reason_row
from longrl.evaluation.answering import doc_hash
from longrl.evaluation.own_answers import ChoiceRules, OwnAnswer, choose, choose_records, find_answers, record_of
from longrl.io.jsonl import read_jsonl
from longrl.types import Row

QUESTION = {
    "problem_id": "q1", "problem": "Which?\nA. cat\nB. dog", "answer": "B", "problem_type": "temporal",
    "videos": ["clips/1.mp4"], "metadata": {"span_s": [0, 5], "subtitles": "lines/1.srt"},
}  # fmt: skip
ANSWERS = [
    ("<think>Long, long thoughts.</think>\n<answer>B</answer>", 1.0, 1.0, "stop"),
    ("<think>Short.</think><answer>B</answer>", 1.0, 0.9, "stop"),
    ("<think>Short.</think> <answer>B</answer>", 1.0, 1.0, "stop"),  # other white space, another reward
    ("<think>Short.</think>\n<answer>B</answer>  ", 1.0, 0.9, "stop"),  # the same but for white space
    ("<answer>A</answer>", 0.0, 0.0, "stop"),
    ("<think>Wrong, by long, long thoughts.</think><answer>A</answer>", 0.0, 0.0, "stop"),
    ("<think>Wrong.</think><answer>A</answer>", 0.0, 0.1, "stop"),
    ("<think>Never", 0.0, 0.0, "length"),
]


def line(row, answers=ANSWERS, index=0, **fields):
    texts, scores, rewards, reasons = (list(column) for column in zip(*answers, strict=True))
    return {
        "condition": "video", "doc_id": index, "doc_hash": doc_hash(row), "id": row.id, "error": None,
        "resps": [texts], "accuracy": scores, "reward": rewards, "finish_reason": reasons, **fields,
    }  # fmt: skip


def question(root="root"):
    return longvideo_reason_row(QUESTION, 0, root)


def test_a_pair_is_the_best_right_answer_and_the_worst_wrong_one_of_its_length():
    chosen = choose_records([line(question())], [question()], ChoiceRules(), "root")
    (record,) = chosen.records
    assert record["chosen"] == ANSWERS[0][0]
    assert record["rejected"] == ANSWERS[5][0]
    assert chosen.counts == {
        "questions": 1, "questions with a record": 1, "answers cut off": 1, "answers repeated or empty": 1,
    }  # fmt: skip
    assert chosen.summary()["mean characters, chosen"] == len(ANSWERS[0][0])


def test_no_wrong_answer_is_in_two_pairs_of_a_question():
    rules = ChoiceRules(per_question=9)
    chosen = choose_records([line(question())], [question()], rules, "root")
    assert [record["chosen"] for record in chosen.records] == [ANSWERS[n][0] for n in (0, 2, 1)]
    assert sorted(record["rejected"] for record in chosen.records) == sorted(ANSWERS[n][0] for n in (4, 5, 6))
    assert [record["problem_id"] for record in chosen.records] == ["q1-0", "q1-1", "q1-2"]


def test_targets_are_the_best_right_answers_each_once():
    rules = ChoiceRules("sft", per_question=2, min_reward=0.95)
    chosen = choose_records([line(question())], [question()], rules, "root")
    assert [record["chosen"] for record in chosen.records] == [ANSWERS[0][0], ANSWERS[2][0]]
    assert all("rejected" not in record for record in chosen.records)


@pytest.mark.parametrize(("ratio", "taken"), [(None, 1), (1.5, 1), (1.05, 0)])
def test_lengths_of_a_pair_may_be_held_alike(ratio, taken):
    answers = [OwnAnswer("x" * 100, 1.0, 1.0), OwnAnswer("y" * 10, 0.0, 0.0), OwnAnswer("z" * 110, 0.0, 0.5)]
    counts = Counter()
    pairs = choose(answers, ChoiceRules(max_length_ratio=ratio), counts)
    assert len(pairs) == taken
    if taken:
        assert len(pairs[0]["rejected"]) == (10 if ratio is None else 110)
    else:
        assert counts == {"questions whose answers differ too much in length": 1}


def test_questions_that_are_all_right_or_all_wrong_give_no_pair():
    for answers, name in ((ANSWERS[:2], "without a wrong answer"), (ANSWERS[4:6], "without a right answer")):
        chosen = choose_records([line(question(), answers)], [question()], ChoiceRules())
        assert chosen.records == []
        assert chosen.counts[f"questions {name}"] == 1


def test_what_no_rule_judges_is_told_apart_by_its_reward():
    answers = [(text, None, reward, reason) for text, _, reward, reason in ANSWERS]
    (record,) = choose_records([line(question(), answers)], [question()], ChoiceRules()).records
    assert (record["chosen"], record["rejected"]) == (ANSWERS[0][0], ANSWERS[5][0])


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"error": "decode"}, "answers to questions without a score"), ({"turns": [[]]}, "answers of several turns")],
)
def test_answers_that_are_no_text_with_a_score_are_counted(fields, name):
    chosen = choose_records([line(question(), **fields)], [question()], ChoiceRules())
    assert chosen.records == []
    assert chosen.counts[name]


def test_answers_to_other_questions_are_refused():
    with pytest.raises(ValueError, match="question 'q1' of the answers is not number 0 of --questions"):
        choose_records([line(question())], [longvideo_reason_row(QUESTION | {"answer": "A"}, 0)], ChoiceRules())


@pytest.mark.parametrize(
    "record",
    [
        QUESTION,
        {"messages": [{"role": "user", "content": "<video>Which?"}], "videos": "clips/1.mp4", "answer": "B", "id": "q"},
        {"problem": "1 + 1?", "answer": "2", "tools": [{"name": "add"}], "images": ["a.png", "https://a/b.png"]},
    ],
    ids=["question", "conversation", "images"],
)
def test_a_record_is_read_to_the_row_that_it_is_of(record):
    row = longvideo_reason_row(record, 3, "root")
    again = json.loads(json.dumps(record_of(row, "root")))
    assert longvideo_reason_row(again, 0, "root") == row


def test_the_command_writes_records_that_are_read_to_the_letter(tmp_path, capsys):
    questions = tmp_path / "data" / "questions.jsonl"
    questions.parent.mkdir()
    questions.write_text(json.dumps(QUESTION) + "\n")
    folder = tmp_path / "run" / "predict"
    folder.mkdir(parents=True)
    row = question(str(questions.parent))
    (folder / "samples.jsonl").write_text(json.dumps(line(row)) + "\n")
    out = questions.parent / "pairs.jsonl"
    command = ["own-answers", f"--run={tmp_path / 'run'}", f"--questions={questions}", f"--out={out}"]
    main(command)
    said = capsys.readouterr().out
    assert "questions with a record: 1" in said
    assert f"--data.train {out} --data.stage preference --data.media_root {questions.parent}" in said
    (record,) = read_jsonl(out)
    again = longvideo_reason_row(record, 0, str(questions.parent))
    assert (again.response, again.rejected) == (ANSWERS[0][0], ANSWERS[5][0])
    assert (again.problem, again.answer, again.videos, again.metadata) == (
        row.problem, row.answer, row.videos, row.metadata,
    )  # fmt: skip
    with pytest.raises(ValueError, match="is there already; name another file"):
        main(command)
    with pytest.raises(ValueError, match="no answer of .* is taken by these rules"):
        main([*command[:3], f"--out={tmp_path / 'x'}", "--min_reward=2"])
    with pytest.raises(ValueError, match="--max_rows must be at least 1, got -1"):
        main([*command[:3], f"--out={tmp_path / 'x'}", "--max_rows=-1"])


def test_folders_without_answers_and_several_conditions_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="has no answers of `predict`, `test` or `evaluate`; sample some by"):
        find_answers(tmp_path)
    lines = [line(question()), line(question()) | {"condition": "blind"}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    with pytest.raises(ValueError, match="--condition must be one of 'video', 'blind', got None"):
        find_answers(tmp_path)
    assert find_answers(tmp_path, "blind")[0]["condition"] == "blind"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_question": 0}, "--per_question must be at least 1, got 0"),
        ({"max_length_ratio": 0.5}, "--max_length_ratio must be at least 1, got 0.5"),
        ({"right_from": 0.2}, "--wrong_below must be at most --right_from, got 0.5 and 0.2"),
    ],
)
def test_rules_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChoiceRules(**options)


def test_a_row_without_pair_has_the_hash_that_it_had():
    """Answers stored before there were pairs are found."""
    plain = Row("1", "Which?", "A")
    assert doc_hash(plain) == doc_hash(Row("1", "Which?", "A", response="x", rejected="y"))
