"""Reward functions `(completion, row) -> float`, one idea each, and their weighted sum."""

from longrl.rewards.length import CosineLength, SoftOverlong
from longrl.rewards.scoring import RewardSum, RewardTerm, load_function
from longrl.rewards.tasks import RewardFn, accuracy, accuracy_lenient, check_answer
from longrl.rewards.text import think_answer_format

__all__ = [
    "CosineLength",
    "RewardFn",
    "RewardSum",
    "RewardTerm",
    "SoftOverlong",
    "accuracy",
    "accuracy_lenient",
    "check_answer",
    "load_function",
    "think_answer_format",
]
