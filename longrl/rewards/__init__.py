"""Reward functions `(completion, row) -> float`, one idea each, and their weighted sum: docs/rewards.md."""

from longrl.rewards.answer_twice import (
    answer_twice_format as answer_twice_format,
    first_answer as first_answer,
    open_first as open_first,
)
from longrl.rewards.answers import think_answer_format as think_answer_format
from longrl.rewards.length import CosineLength as CosineLength, SoftOverlong as SoftOverlong
from longrl.rewards.reward_sum import (
    RewardFn as RewardFn,
    RewardSum as RewardSum,
    RewardTerm as RewardTerm,
    accuracy as accuracy,
    accuracy_lenient as accuracy_lenient,
    check_answer as check_answer,
)
from longrl.rewards.signatures import ColumnReward as ColumnReward
from longrl.rewards.tool_use import (
    Grounding as Grounding,
    used_tools as used_tools,
    well_formed_calls as well_formed_calls,
)
