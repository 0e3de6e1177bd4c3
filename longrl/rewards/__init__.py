"""Reward functions `(completion, row) -> float`, one idea each, and their weighted sum."""

from longrl.rewards.answers import think_answer_format
from longrl.rewards.length import CosineLength, SoftOverlong
from longrl.rewards.reward_sum import RewardFn, RewardSum, RewardTerm, accuracy, accuracy_lenient, check_answer

__all__ = [
    "CosineLength",
    "RewardFn",
    "RewardSum",
    "RewardTerm",
    "SoftOverlong",
    "accuracy",
    "accuracy_lenient",
    "check_answer",
    "think_answer_format",
]
