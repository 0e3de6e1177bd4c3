"""No scorer takes longer than 50 ms for 50,000 characters, whatever they are: rewards of a step are many."""

import random
import time

import pytest

from longrl.rewards.reward_sum import ACCURACY, LENIENT_ACCURACY
from longrl.types import Completion, Row

LIMIT_S = 0.05
SLOW_MACHINE = 6
"""Machines that share their cores take several times as long; a quadratic rule takes a hundred times."""
NUM_CHARS = 50_000

GOLDS = {
    "numeric": "5",
    "regression": "5",
    "math": r"x^2 + \frac{1}{2}",
    "exact": "a red car",
    "ocr": " ".join(f"w{n}" for n in range(100)),
    "free_form": " ".join(f"running{n} cats" for n in range(50)),
    "temporal_iou": "0:10-0:20",
    "box_iou": ", ".join(f'{{"time": {n}.0, "bbox_2d": [{n}, 2, 30, 40]}}' for n in range(1, 30)),
}
FRAGMENTS = (
    "1", "1 ", "1,", "1.", "1:", "-1", "- 1 ", "1-", "1/2 ", "2^", "10^", "(1+", "(", "((", "|1", "{", "[1,",
    "[[1, 2], ", r"\frac{", r"\frac", r"\sqrt{", r"\text{", r"\boxed{", r"\boxed{1}", r"\left(", "x=1 ", "1=",
    "x+", "x^2", "sin(", "$", "one ", "one hundred and ", "twenty-", "half ", "not 1 ", "so 1 ", "answer is 1 ",
    "1 in total ", "1 of ", "no ", "**", "**1** ", "`", "<", "<a>", "<a", "#\n", "\n# 1", "'", '"', "_a", "a", "aa ",
    "a1", "running ", "1e5", "3k", "12 to 20 ", "starts at 1 ", "ends at 2 ", '{"start": 1, ', '"end": 2}',
    "00:00:12,000 --> ", "<1.0 seconds>", "[1,2,3,4] ", '{"time": 1.0, "bbox_2d": [1,2,3,4]}, ', '"12": [',
    "at<t>1</t>s ", "<answer>", "</answer>", "<think>", "\ufdfa", "\ufdfa ", "\u00bd", "\u00b2", "\u3300", "\u4e00",
    "\u4e00\u5341", "3\u4e07", "\u534a", "\u221a", "\u3000", " ", "\t", "\u200b",
)  # fmt: skip
"""Pieces that rules look for; U+FDFA is 18 characters after NFKC, U+3300 four."""


def seconds(judge, text: str, row: Row) -> float:
    """The least of several runs: what the scorer needs, whatever else the machine does."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        judge(Completion((), (), text, "stop"), row)
        times.append(time.perf_counter() - start)
        if times[-1] < LIMIT_S:
            break
    return min(times)


def adversarial_texts(seed: int) -> list[str]:
    draw = random.Random(seed)
    pieces = [*FRAGMENTS, *("".join(draw.sample(FRAGMENTS, draw.randint(2, 5))) for _ in range(40))]
    texts = [(piece * (NUM_CHARS // len(piece) + 1))[:NUM_CHARS] for piece in pieces]
    return [*texts, " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(NUM_CHARS // 7))]


@pytest.mark.parametrize("task", GOLDS)
def test_a_scorer_is_done_in_50_ms_whatever_the_answer_holds(task):
    row = Row("1", "?", GOLDS[task], task=task)
    judges = (ACCURACY[task], lambda text: f"<answer>{text[:-17]}</answer>"), (LENIENT_ACCURACY[task], str)
    for judge, wrap in judges:
        judge(Completion((), (), "<answer>x + x</answer>", "stop"), row)  # starts the process that math asks
        slow = {}
        for text in adversarial_texts(seed=len(task)):
            taken = seconds(judge, wrap(text), row)
            if taken > LIMIT_S * SLOW_MACHINE:
                slow[text[:40]] = taken
        assert slow == {}
