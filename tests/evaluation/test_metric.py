"""One metric for `validate`, `test` and `evaluate`: the same numbers whoever counts, on however many ranks."""

import random

import pytest
import torch

from longrl.evaluation.metric import CategoryAccuracy
from longrl.evaluation.records import group_records
from longrl.rewards import RewardSum, RewardTerm
from longrl.strategies.axis import Axis
from longrl.types import Completion, Group, Prompt, Row
from tests.distributed import run_distributed

TEXTS = (
    "<think>x</think><answer>A</answer>", "<think>x</think><answer>B</answer>", "<answer>cat</answer>",
    "The answer is B.", "no idea", "<think>x</think>\nSo it is A",
)  # fmt: skip


def answered(count: int = 40) -> list[tuple[Row, list[Completion]]]:
    """Questions on ten videos in three categories, with one to three answers each."""
    draw = random.Random(5)
    found = []
    for n in range(count):
        row = Row(
            str(n), "Which?\nA. cat\nB. dog", draw.choice("AB"), category=draw.choice(("x", "y", "z")),
            videos=(f"clips/{draw.randrange(10)}.mp4",), metadata={"duration": draw.choice(("short", "long"))},
        )  # fmt: skip
        texts = [draw.choice(TEXTS) for _ in range(draw.randint(1, 3))]
        reasons = [draw.choice(("stop", "stop", "length")) for _ in texts]
        made = [Completion(torch.zeros(3), torch.zeros(3), *pair) for pair in zip(texts, reasons, strict=True)]
        found.append((row, made))
    return found


def counted(questions, axis=None) -> CategoryAccuracy:
    metric = CategoryAccuracy(axis) if axis else CategoryAccuracy()
    for row, completions in questions:
        metric.update(group_records(row, group(row, completions), ["duration"]))
    return metric


def group(row, completions) -> Group:
    prompt = Prompt(row.id, torch.zeros(3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long), (), row)
    made = Group(prompt, completions)
    RewardSum([RewardTerm("longrl.rewards.accuracy")]).score([made])
    return made


def test_numbers_by_hand():
    rows = [Row(str(n), "Which?\nA. cat\nB. dog", "A", category=c, videos=(f"{n}.mp4",)) for n, c in enumerate("xxy")]
    texts = (("<think>t</think><answer>A</answer>", "B"), ("The answer is A",), ("<think>t</think><answer>B</answer>",))
    questions = [
        (row, [Completion(torch.zeros(1), torch.zeros(1), text, "stop") for text in of_row])
        for row, of_row in zip(rows, texts, strict=True)
    ]
    found = {name: float(value) for name, value in counted(questions).compute().items()}
    assert found == {
        "strict_accuracy": pytest.approx(0.5 / 3),
        "robust_accuracy": 0.5,
        "format_rate": 0.5,
        "truncation_rate": 0.0,
        "strict_accuracy/x": 0.25,
        "strict_accuracy/y": 0.0,
    }


def test_overlaps_are_counted_under_their_task():
    row = Row("1", "When?", "0 to 10 s", task="temporal_iou")
    texts = "<answer>0 to 6 s</answer>", "0 to 10 s"
    completions = [Completion(torch.zeros(1), torch.zeros(1), text, "stop") for text in texts]
    found = {name: float(value) for name, value in counted([(row, completions)]).compute().items()}
    assert found["temporal_iou/mIoU"] == pytest.approx(0.3)
    assert (found["temporal_iou/R@0.5"], found["temporal_iou/R@0.7"]) == (0.5, 0.0)


def test_the_order_of_questions_changes_no_bit():
    questions = answered()
    other = list(questions)
    random.Random(1).shuffle(other)
    assert counted(questions).summary() == counted(other).summary()


def test_nothing_counted_is_nothing_and_a_reset_forgets():
    metric = counted(answered())
    metric.reset()
    assert metric.summary() is None
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute() == {}


def on_a_rank(world_size: int):
    """Every rank its rows; the last rank has none."""
    axis = Axis.of(None)
    own = answered()[axis.rank :: world_size - 1] if axis.rank < world_size - 1 else []
    metric = counted(own, axis)
    return metric.summary(), {name: float(value) for name, value in metric.compute().items()}


def test_three_ranks_one_without_questions_count_as_one():
    wanted = counted(answered())
    for summary, numbers in run_distributed(on_a_rank, 3, 3):
        assert summary == wanted.summary()
        assert numbers == {name: float(value) for name, value in wanted.compute().items()}
