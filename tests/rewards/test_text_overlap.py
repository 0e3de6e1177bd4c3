"""Word error rates and ROUGE, against figures of the code that Video-R1 released and against the plain tables."""

import pytest
from hypothesis import given, strategies as st

from longrl.rewards.text_overlap import (
    check_reference,
    common_subsequence_length,
    edit_distance,
    free_form_accuracy,
    free_form_accuracy_lenient,
    mean_rouge,
    transcription_accuracy,
    transcription_accuracy_lenient,
    word_error_rate,
)
from longrl.types import Completion, Row

# Its accuracy_reward for problem_type OCR and free-form (rouge-score 0.1.2 with stems), run on these pairs.
RELEASED_OCR = [
    ("is a It's is 2024 dogs runs dog 3 is", "is It's 2024 dogs runs dog is", 0.7),
    ("world! is relational was", "world! is", 0.5),
    ("cat 3 nations 3 world! jumps", "cat 3 nations 3 jumps", 0.833333),
    ("happily nations the runs being happily lazy", "the runs happily lazy", 0.571429),
    ("OPEN 24 hours", "OPEN 24 hours", 1.0),
    ("OPEN", "open", 0.0),
    ("OPEN", "OPEN at all hours of the day", 0.0),
    ("OPEN", "", 0.0),
]
RELEASED_FREE_FORM = [
    ("is a It's is 2024 dogs runs dog 3 is", "is It's 2024 dogs runs dog is", 0.718266),
    ("The cat sat on the mat.", "A cat is sitting on the mat", 0.531469),
    ("A man runs happily", "the man is running, happily", 0.539683),
    ("He opens the door and leaves", "leaves and he opens the door", 0.755556),
    ("a b c d", "d c b a", 0.416667),
    ("It's 3:45", "it s 3 45", 1.0),
    ("cat", "cat", 0.666667),
    ("cat", "", 0.0),
]


def completion(answer: str) -> Completion:
    return Completion((), (), f"<think>x</think><answer>{answer}</answer>", "stop")


@pytest.mark.parametrize(("gold", "answer", "reward"), RELEASED_OCR)
def test_transcriptions_earn_what_the_released_code_gives(gold, answer, reward):
    assert transcription_accuracy(completion(answer), Row("1", "?", gold, task="ocr")) == pytest.approx(
        reward, abs=1e-6
    )


@pytest.mark.parametrize(("gold", "answer", "reward"), RELEASED_FREE_FORM)
def test_free_answers_earn_what_the_released_code_gives(gold, answer, reward):
    assert free_form_accuracy(completion(answer), Row("1", "?", gold, task="free_form")) == pytest.approx(
        reward, abs=1e-6
    )


def test_without_a_tag_only_the_lenient_judges_read():
    bare, row = Completion((), (), "<think>no</think>OPEN 24", "stop"), Row("1", "?", "OPEN 24")
    assert (transcription_accuracy(bare, row), transcription_accuracy_lenient(bare, row)) == (0.0, 1.0)
    assert (free_form_accuracy(bare, row), free_form_accuracy_lenient(bare, row)) == (0.0, 1.0)


WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@given(WORDS, WORDS)
def test_bit_vectors_give_what_the_plain_tables_give(first, second):
    distances = list(range(len(second) + 1))
    common = [0] * (len(second) + 1)
    for row, word in enumerate(first, start=1):
        before, distances = distances, [row]
        shared, common = common, [0]
        for column, other in enumerate(second, start=1):
            replaced = before[column - 1] + (word != other)
            distances.append(min(before[column] + 1, distances[-1] + 1, replaced))
            common.append(shared[column - 1] + 1 if word == other else max(shared[column], common[-1]))
    assert edit_distance(first, second) == distances[-1]
    assert common_subsequence_length(first, second) == common[-1]


@given(st.text(), st.text())
def test_scores_lie_between_0_and_1(reference, text):
    assert 0 <= word_error_rate(reference, text) <= 1
    assert 0 <= mean_rouge(reference, text) <= 1


def test_a_reference_without_latin_words_is_an_error_with_the_remedy():
    check_reference(Row("9", "?", "a cat", task="free_form"))
    with pytest.raises(ValueError, match=r"row '9'.*needs words of a to z.*task='open_ended'"):
        check_reference(Row("9", "?", "\u4e00\u53ea\u732b", task="free_form"))
