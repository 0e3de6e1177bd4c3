"""Pairs of answers as the field's sets spell them, all read to one row; and rows that are no pair."""

import json

import pytest

from longrl.datamodules.rows import chat_row, longvideo_reason_row
from longrl.datamodules.rows.pairs import is_pair, pair_row
from longrl.types import Row

ASKED = {"role": "user", "content": "Which comes first?"}
A, B = "<think>The cat.</think><answer>A</answer>", "<think>The dog.</think><answer>B</answer>"
TRL_A, TRL_B = {"role": "assistant", "content": A}, {"role": "assistant", "content": B}
TEXTS = {
    "own": {"problem": "Which comes first?", "chosen": A, "rejected": B},
    "rlaif-v": {"question": "Which comes first?", "chosen": A, "rejected": B},
    "trl, standard": {"prompt": "Which comes first?", "chosen": A, "rejected": B},
    "trl, prompt as text": {"prompt": "Which comes first?", "chosen": [ASKED, TRL_A], "rejected": [ASKED, TRL_B]},
    "llama-factory, alpaca": {"instruction": "Which comes", "input": "first?", "chosen": A, "rejected": B},
}
CHATS = {
    "trl": {"prompt": [ASKED], "chosen": [TRL_A], "rejected": [TRL_B]},
    "trl, implicit prompt": {"chosen": [ASKED, TRL_A], "rejected": [ASKED, TRL_B]},
    "trl, JSON text": {"prompt": json.dumps([ASKED]), "chosen": json.dumps([TRL_A]), "rejected": json.dumps([TRL_B])},
    "llama-factory": {
        "conversations": [{"from": "human", "value": "Which comes first?"}],
        "chosen": {"from": "gpt", "value": A},
        "rejected": {"from": "gpt", "value": B},
    },
    "ms-swift": {"messages": [ASKED, TRL_A], "rejected_response": B},
    "ms-swift, message": {"messages": [ASKED, TRL_A], "rejected_response": [TRL_B]},
    "parts": {"prompt": [ASKED], "chosen": [{**TRL_A, "content": [{"type": "text", "text": A}]}], "rejected": [TRL_B]},
}


@pytest.mark.parametrize("record", [*TEXTS.values(), *CHATS.values()], ids=[*TEXTS, *CHATS])
def test_every_spelling_is_the_same_pair(record):
    row = longvideo_reason_row(record, 7)
    assert (row.response, row.rejected) == (A, B)
    assert row.problem.replace("\n", " ") == "Which comes first?"
    assert (row.answer, row.task) == ("A", "open_ended")
    is_chat = record in CHATS.values() or record is TEXTS["trl, prompt as text"]
    assert bool(row.messages) == is_chat
    assert pair_row(row) is row


def test_a_record_of_mmpr_has_its_image_and_its_right_answer():
    record = {
        "id": 3, "image": "a/1.png", "question": "<image>\nHow many?", "chosen": "Two.\n", "rejected": "Three.",
        "answer_gt": "2",
    }  # fmt: skip
    row = longvideo_reason_row(record, 0, "root")
    assert row.images == ("root/a/1.png",)
    assert (row.problem, row.answer, row.task) == ("<image>\nHow many?", "2", "numeric")
    assert row.response == "Two.\n"  # to the letter


def test_media_of_messages_stay_where_they_are():
    content = [{"type": "video"}, {"type": "text", "text": "What?"}]
    record = {"prompt": [{"role": "user", "content": content}], "videos": ["v.mp4"], "chosen": [TRL_A]}
    row = chat_row(record | {"rejected": [TRL_B]}, 0)
    assert row.videos == ("v.mp4",)
    assert [part["type"] for part in row.messages[0]["content"]] == ["video", "text"]


def test_thinking_that_stands_apart_comes_first():
    chosen = {"role": "assistant", "reasoning_content": "The cat.", "content": "A"}
    row = longvideo_reason_row({"prompt": [ASKED], "chosen": [chosen], "rejected": [TRL_B]}, 0)
    assert row.response == "<think>\nThe cat.\n</think>\n\nA"


def test_what_a_question_says_of_its_answer_counts():
    record = TEXTS["own"] | {"problem": "Which?\nA. cat\nB. dog", "answer": "B", "videos": "v.mp4"}
    row = longvideo_reason_row(record, 0)
    assert (row.answer, row.task, row.response) == ("B", "multiple_choice", A)


def test_an_answer_alone_is_a_target_and_no_pair():
    row = longvideo_reason_row({"problem": "Which?", "answer": "A", "chosen": A}, 0)
    assert (row.response, row.rejected) == (A, None)
    assert not is_pair({"problem": "Which?", "rejected": B})
    assert longvideo_reason_row({"problem": "Which?", "answer": "A"}, 0).response is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": [ASKED], "chosen": [ASKED, TRL_A], "rejected": [TRL_B]}, "follow different messages"),
        ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [TRL_B]}, "must be a text of the assistant"),
        ({"prompt": [ASKED], "chosen": [{**TRL_A, "content": " "}], "rejected": [TRL_B]}, "empty last answer"),
        ({"problem": "Which?", "chosen": 1, "rejected": 0}, "'chosen', which must be a text or messages, got 1"),
        ({"chosen": A, "rejected": B}, "needs 'problem'"),
    ],
)
def test_records_that_are_half_a_pair_name_what_is_wrong(record, message):
    with pytest.raises(ValueError, match=rf"record 4 .*{message}"):
        longvideo_reason_row(record, 4)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "needs 'chosen', which is missing: data.stage=preference"),
        ({"response": A}, "needs 'rejected', which is missing"),
        ({"response": " ", "rejected": B}, "needs 'chosen', which is empty"),
        ({"response": A, "rejected": A}, "the same answer as chosen and as rejected"),
    ],
)
def test_rows_that_are_no_pair_to_learn_from_say_why(answers, message):
    with pytest.raises(ValueError, match=f"row '7' .*{message}"):
        pair_row(Row("7", "Which?", "A", **answers))
