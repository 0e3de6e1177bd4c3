"""Replies in every wrapping, and every fault a question can have."""

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from longrl.chat.endpoint import Reply
from longrl.pipeline.asking import UnusableReply, answered_text, mostly_latin
from longrl.pipeline.config import QuestionOptions, ValidateOptions
from longrl.pipeline.parsing import ParsedQuestion, Step, json_objects, parse_question, seconds_of
from longrl.pipeline.questions import check_rewriting
from longrl.pipeline.validation import cut_steps_at, find_faults, triple_similarity

REPLY = {
    "question": "What does she do after the kettle boils?",
    "options": ["pours tea", "cuts bread", "opens the door", "feeds the cat"],
    "answer": "pours tea",
    "reasoning": [{"start": 3, "end": "0:12", "text": "The kettle boils."}, {"start": 12.0, "end": 20, "text": "Tea."}],
}
GOOD = ParsedQuestion(
    "multiple_choice", REPLY["question"], tuple(REPLY["options"]), "pours tea",
    (Step(3.0, 12.0, "The kettle boils."), Step(12.0, 20.0, "Tea.")),
)  # fmt: skip
OPEN = replace(GOOD, kind="open_ended", options=())


def said(**changes) -> str:
    return json.dumps({**REPLY, **changes})


def kinds(question: ParsedQuestion, *, duration_s=20.0, earlier=(), boxes=False, asked=None, **options) -> list[str]:
    found = find_faults(
        question, duration_s, earlier, asked or QuestionOptions(), ValidateOptions(**options), boxes
    )  # fmt: skip
    return [kind for kind, _ in found]


# ---- parsing ----


@pytest.mark.parametrize(
    "wrapping",
    [
        "{}", "```json\n{}\n```", "Sure! {} I hope it helps.", "<b>{{not json}}</b> {}", '{{"thought": 1}} {}', "[{}]",
        "\ufeff{}\n\n\n",
    ],
)  # fmt: skip
def test_a_question_is_found_in_any_wrapping(wrapping):
    assert parse_question(wrapping.format(said()), "multiple_choice") == GOOD


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({"A": "pours tea", "B": "cuts bread"}, "A"), (["A. pours tea", "B. cuts bread"], "a)"),
        (["(A) pours tea", "(B) cuts bread"], "(A) pours tea"), (["pours tea", "cuts bread"], "A. Pours tea"),
        (["pours tea", "cuts bread"], "pours  tea "), (["pours tea", "cuts bread"], "Option A"),
        (["pours\ntea", "cuts bread"], "A: pours tea"),
    ],
)  # fmt: skip
def test_options_and_answers_come_in_many_spellings(options, answer):
    found = parse_question(said(options=options, answer=answer), "multiple_choice")
    assert (found.options, found.answer) == (("pours tea", "cuts bread"), "pours tea")


def test_options_that_begin_with_a_letter_by_themselves_stay_whole():
    found = parse_question(said(options=["a. m.", "p. m."], answer="p. m."), "multiple_choice")
    assert found.options == ("a. m.", "p. m.")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("I cannot do that.", "no json"), ("", "no json"), (said()[:-20], "no json"), ("{}", "no json"),
        (said(question=""), "bad schema"), (said(question=None), "bad schema"), (said(options="A, B"), "bad schema"),
        (said(options=[]), "bad schema"), (said(options=[{}]), "bad schema"), (said(reasoning="because"), "bad schema"),
        (said(reasoning=["because"]), "bad schema"), (said(answer="flies away"), "answer outside the options"),
        (said(answer="F"), "answer outside the options"), (said(answer=["pours tea"]), "bad schema"),
        (said(reasoning=[{"start": "soon", "end": 3, "text": "x"}]), "bad times"),
        (said(reasoning=[{"text": "x"}]), "bad times"), (said(reasoning=[{"start": 0, "end": 1}]), "bad schema"),
        (said(box=[1, 2]), "bad schema"), (said(box={"corners": [1, 2, 3, 10**400], "time": 1}), "bad schema"),
        (said(reasoning=[{"start": 0, "end": 10**400, "text": "x"}]), "bad times"),
        (said(reasoning=[{"start": 0, "end": "1" + " " * 20_000 + "!", "text": "x"}]), "bad times"),
        (said(reasoning=[{"start": 0, "end": float("inf"), "text": "x"}]), "bad times"),
        (said(reasoning=[{"start": 0, "end": "9" * 400, "text": "x"}]), "bad times"),
        ('{"question": ' + "[" * 100_000, "no json"),
    ],
)  # fmt: skip
def test_what_is_no_question_says_why(text, kind):
    with pytest.raises(UnusableReply) as error:
        parse_question(text, "multiple_choice")
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(7, 7.0), (7.5, 7.5), ("7.5", 7.5), ("7.5 s", 7.5), ("1:15", 75.0), ("1:00:15.5", 3615.5), (" 12 seconds", 12.0)],
)
def test_times_are_read(value, seconds):
    assert seconds_of(value) == seconds


def test_other_languages_are_questions_too():
    changes = {"question": "\u4ed6\u5012\u4ec0\u4e48\uff1f", "options": ["\u8336", "\u6c34", "\u5496\u5561", "\u5976"]}
    found = parse_question(said(**changes, answer="\u8336"), "multiple_choice")
    assert kinds(found) == []
    assert kinds(found, english_only=True) == ["not English"]
    assert not mostly_latin(found.question)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries({}, optional=dict.fromkeys((*REPLY, "box", "steps"), JSON))


@given(FIELDS, st.sampled_from(["multiple_choice", "open_ended"]))
def test_any_object_is_a_question_or_unusable(fields, kind):
    try:
        found = parse_question(json.dumps({"question": "Why?", **fields}), kind)
    except UnusableReply:
        return
    list(find_faults(found, 10.0, ["Why?"], QuestionOptions(), ValidateOptions(), True))


@given(st.text(max_size=200))
def test_any_text_is_a_question_or_unusable(text):
    list(json_objects(text))
    with pytest.raises(UnusableReply):
        parse_question(text.replace("question", ""), "open_ended")


@pytest.mark.parametrize(
    "text", ["{" * 100_000, '{"a":' * 20_000, '{"' * 50_000, '{"a": 1, ' * 400 + '"' + "x" * 60_000]
)
def test_objects_are_searched_in_linear_time(text):
    start = time.process_time()
    assert list(json_objects(text)) == []
    assert time.process_time() - start < 2.0  # 50 ms; up to 20 s if each brace is tried


def squeezed(text: str) -> str:
    return "".join(text.split())


@given(
    question=st.text("abc \u4e2d?", min_size=1).filter(str.strip),
    options=st.lists(st.text("defgh ", min_size=3).filter(str.strip), min_size=4, max_size=4, unique_by=squeezed),
    right=st.integers(0, 3),
    before=st.text("xyz{[ \n"),
)
def test_a_well_formed_reply_is_parsed_as_meant_whatever_stands_before_it(question, options, right, before):
    text = before + json.dumps({**REPLY, "question": question, "options": options, "answer": options[right]})
    found = parse_question(text, "multiple_choice")
    assert found.answer == found.options[right] == " ".join(options[right].split())
    assert found.steps == GOOD.steps


# ---- faults ----


def test_a_good_question_has_no_fault():
    assert kinds(GOOD) == []
    assert kinds(OPEN) == []


LONG = "pours tea into the big blue cup that stands beside the window"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"options": GOOD.options[:3]}, "wrong number of options"),
        ({"options": (*GOOD.options[:3], "Cuts bread!")}, "equal options"),
        ({"options": (*GOOD.options[:3], "All of the above")}, "all or none of the above"),
        ({"options": (LONG, *GOOD.options[1:]), "answer": LONG}, "length tells the answer"),
        ({"options": ("tea", *(f"{LONG} {n}" for n in range(3))), "answer": "tea"}, "length tells the answer"),
        ({"question": "She pours tea. What does she do?"}, "answer in the question"),
        ({"question": "What do the captions say?"}, "speaks of captions"),
        ({"question": "What is seen according to the description?"}, "speaks of captions"),
        ({"steps": ()}, "no reasoning"),
        ({"steps": (Step(3.0, 3.0, "x"),)}, "times outside the video"),
        ({"steps": (Step(-1.0, 3.0, "x"),)}, "times outside the video"),
        ({"steps": (Step(30.0, 40.0, "x"),)}, "times outside the video"),
        ({"steps": (Step(1.0, float("nan"), "x"),)}, "times outside the video"),
        ({"steps": (Step(1.0, 2.0, "So option B it is."),)}, "names a letter"),
        ({"steps": (Step(1.0, 2.0, "The answer is (C)"),)}, "names a letter"),
        ({"steps": (Step(1.0, 2.0, "<answer>x</answer>"),)}, "has tags"),
        ({"box": (0.0, 0.0, 1200.0, 5.0), "box_at_s": 1.0}, "bad box"),
        ({"box": (9.0, 0.0, 3.0, 5.0), "box_at_s": 1.0}, "bad box"),
        ({"box": (0.0, 0.0, 3.0, 5.0), "box_at_s": 100.0}, "times outside the video"),
    ],
)
def test_every_fault_is_found(changes, kind):
    assert kinds(replace(GOOD, **changes)) == [kind]


def test_a_question_that_names_several_options_does_not_tell():
    assert kinds(replace(GOOD, question="Does she feed the cat or pour: pours tea, cuts bread?")) == []


def test_open_answers_must_be_short_and_boxes_there_if_wanted():
    assert kinds(replace(OPEN, answer="word " * 50)) == ["answer too long"]
    assert kinds(GOOD, boxes=True) == ["no box"]
    assert kinds(replace(GOOD, box=(0.0, 0.0, 3.0, 5.0), box_at_s=1.0), boxes=True) == []


def test_repeated_questions_are_duplicates_and_similar_ones_are_not():
    assert kinds(GOOD, earlier=["what does she do after the  kettle boils"]) == ["duplicate"]
    assert kinds(GOOD, earlier=["What does she do before the guests arrive?"]) == []


def test_an_end_that_was_rounded_up_is_cut_and_one_far_behind_is_not():
    assert cut_steps_at(GOOD, 19.6).steps[-1].end_s == 19.6
    assert kinds(cut_steps_at(GOOD, 19.6), duration_s=19.6) == []
    assert kinds(cut_steps_at(GOOD, 15.0), duration_s=15.0) == ["times outside the video"]


@given(st.text(), st.text())
def test_similarity_is_symmetric_and_one_for_equal_texts(first, second):
    assert triple_similarity(first, second) == triple_similarity(second, first)
    assert 0.0 <= triple_similarity(first, second) <= 1.0
    assert triple_similarity(first, first) == 1.0


# ---- replies as such ----


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply("I'm sorry, but I can't help with that.", "stop", None, 0, 0), "refused"),
        (Reply("I cannot assist.", "stop", None, 0, 0), "refused"),
        (Reply("", "stop", "policy", 0, 0), "refused"),
        (Reply("half", "content_filter", None, 0, 0), "refused"),
        (Reply(" \n", "stop", None, 0, 0), "empty"),
        (Reply("<think>long and", "length", None, 0, 0), "cut"),
    ],
)
def test_what_is_no_answer_is_known(reply, kind):
    with pytest.raises(UnusableReply) as error:
        answered_text(reply)
    assert error.value.kind == kind


@pytest.mark.parametrize("text", ["Sorry-looking dogs play.", "<think>I'm sorry</think>A dog runs.", "I see a dog."])
def test_an_answer_is_no_refusal(text):
    assert answered_text(Reply(text, "stop", None, 0, 0)) == text.rpartition("</think>")[2]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("The caption says so.", "speaks of captions"), ("It is option B.", "names a letter"),
        ("<think>x</think>", "has tags"), ("x" * 5000, "too short or long"),
    ],
)  # fmt: skip
def test_a_rewriting_with_a_fault_is_asked_for_again(text, kind):
    with pytest.raises(UnusableReply) as error:
        check_rewriting(text, {"steps": [{"text": "She boils water."}]})
    assert error.value.kind == kind
