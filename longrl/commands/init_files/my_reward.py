"""A reward of yours: take the # away from its line in rl.yaml. More forms: docs/rewards.md."""

from longrl.types import Completion, Row


def my_reward(completion: Completion, row: Row) -> float:
    """1 for an answer of at most 400 characters.

    Args:
        completion: `completion.text` is what the model wrote; `finish_reason` is "length" if it was cut off.
        row: `row.answer` is the ground truth; `row.problem`, `row.task`, `row.category` and `row.metadata` go with it.

    Returns:
        A finite number; None leaves this reward out for the completion.
    """
    return float(len(completion.text) <= 400)
