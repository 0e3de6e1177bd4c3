"""Templates and shares that a data module refuses."""

import pytest

from longrl.datamodules.longvideo_reason import LongVideoReason
from tests.tiny import text_family


@pytest.mark.parametrize(
    ("option", "template", "message"),
    [
        ("question_template", "{problem} {options}", r"may name \{problem\}, \{subtitles\}, got \{options\} in '"),
        ("response_template", "{reason}{answer}", r"may name \{reasoning\}, \{answer\}, \{option\}, got \{reason\}"),
        ("answer_template", "{problem}", r"may name .*, got \{problem\} in '\{problem\}'; correct the name"),
    ],
)
def test_a_name_that_nothing_fills_is_refused(option, template, message):
    with pytest.raises(ValueError, match=rf"data\.{option} {message}"):
        LongVideoReason(text_family(), **{option: template})


def test_other_braces_are_text():
    LongVideoReason(
        text_family(),
        question_template=r"{problem} Answer in \boxed{}, {1, 2} or \frac{1}{2}.",
        response_template=r"{reasoning} \boxed{{answer}} {option}",
        answer_template='{"answer": "{answer}"}',
    )


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_blind_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match=rf"data\.blind_share must be between 0 and 1, got {share}"):
        LongVideoReason(text_family(), blind_share=share)
