"""Rewards for the length of a completion."""

import pytest

from longrl.rewards.length import CosineLength, SoftOverlong
from longrl.types import Completion, Row

ROW = Row(id="1", problem="Which?\nA. cat\nB. dog", answer="B")


def completion(num_tokens: int, text: str = "<answer>B</answer>", finish_reason: str = "stop") -> Completion:
    return Completion(tuple(range(num_tokens)), (), text, finish_reason)


@pytest.mark.parametrize(
    ("num_tokens", "reward"), [(0, 0), (768, 0), (769, -1 / 256), (896, -0.5), (1024, -1), (2000, -1)]
)
def test_soft_overlong_is_equation_13_of_dapo(num_tokens, reward):
    assert SoftOverlong(max_completion_tokens=1024, buffer_tokens=256)(completion(num_tokens), ROW) == pytest.approx(
        reward
    )


@pytest.mark.parametrize("buffer_tokens", [0, -1, 1025])
def test_a_buffer_outside_the_limit_is_an_error(buffer_tokens):
    with pytest.raises(ValueError, match=r"buffer_tokens must lie in 1\.\.max_completion_tokens"):
        SoftOverlong(max_completion_tokens=1024, buffer_tokens=buffer_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "right", "wrong"), [(0, 1.0, -1.0), (50, 0.75, -0.5), (75, 0.573223, -0.146447), (99, 0.5, 0.0)]
)
def test_cosine_length_wants_short_right_and_long_wrong_answers(num_tokens, right, wrong):
    reward = CosineLength(max_completion_tokens=100)
    assert reward(completion(num_tokens), ROW) == pytest.approx(right, abs=3e-4)
    assert reward(completion(num_tokens, "<answer>A</answer>"), ROW) == pytest.approx(wrong, abs=3e-4)


def test_cosine_length_gives_the_numbers_of_the_authors_code_where_their_margin_does_not_reach():
    """Its 2 to 1, -10 to 0 and -10, of 512 and of 1008 tokens with a limit of 1024, by their formula."""
    values = {"right_short": 2.0, "right_full": 1.0, "wrong_short": -10.0, "wrong_full": 0.0, "exceeded": -10.0}
    reward = CosineLength(max_completion_tokens=1024, **values)
    assert reward(completion(512), ROW) == pytest.approx(1.5)
    assert reward(completion(512, "<answer>A</answer>"), ROW) == pytest.approx(-5.0)
    assert reward(completion(256), ROW) == pytest.approx(1.853553, abs=1e-6)
    for text in ("<answer>B</answer>", "<answer>A</answer>"):
        assert reward(completion(1024, text), ROW) == -10.0


def test_cosine_length_punishes_a_completion_that_was_cut_off():
    assert CosineLength(max_completion_tokens=100)(completion(100, finish_reason="length"), ROW) == -1.0
