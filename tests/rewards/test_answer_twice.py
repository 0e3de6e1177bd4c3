"""Answer, think, answer again: the sum of the parts is that of VideoAuto-R1's rewards."""

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

from longrl.rewards import RewardSum
from longrl.types import Completion, Group, Row

ROW = Row("a", "Which?\nA. one\nB. two\nC. three", "B")
OPEN = "<answer>Let's analyze the problem step by step.</answer>"
PIECE = Path(__file__).parents[2] / "configs" / "reward" / "answer_twice.yaml"


@pytest.mark.parametrize(
    ("text", "total"),
    [
        # As `reward.py` of VideoAuto-R1 gives them under the weights of its scripts, boxes in place of the tags.
        ("<answer>B</answer><think>He pours.</think><answer>B</answer>", 3.0),
        ("<answer>A</answer><think>He pours.</think><answer>B</answer>", 2.1),
        ("<answer>B</answer>\n<think>He pours.</think>\n<answer>C</answer>", 1.9),
        (f"{OPEN}<think>He pours.</think><answer>B</answer>", 2.4),
        (f"{OPEN}<think>He pours.</think><answer>A</answer>", 1.0),
        ("<think>He pours.</think><answer>B</answer>", 1.1),
        # There blank thinking has the form, here it does not.
        ("<answer>B</answer><think> </think><answer>B</answer>", 2.0),
        # An answer within the thinking is neither the first nor the last.
        ("<answer>A</answer><think><answer>B</answer></think><answer>C</answer>", 0.0),
        ("He says <answer>B</answer><think>a</think><answer>B</answer>", 2.0),
        ("", 0.0),
    ],
)
def test_the_sum_is_that_of_the_papers_rewards(text, total):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--piece", type=RewardSum, sub_configs=True)
    reward = parser.instantiate(parser.parse_args([f"--piece={PIECE}"])).piece
    group = Group(_Prompt, [Completion(torch.zeros(1), torch.zeros(1), text, "stop")])
    assert reward.score([group]) == 0
    torch.testing.assert_close(group.rewards, torch.tensor([total]))


class _Prompt:
    id = "a"
    row = ROW
