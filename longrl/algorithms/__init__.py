"""RL objectives as a record of orthogonal pure functions; configs/algorithm/ names the combinations of the papers.

One question per file: advantages (what was a completion worth?), surrogates (what does a token's loss look like?),
token_weights (how much does a token count?), kl (how far from the reference?), corrections (did the engine that sampled
agree with the trainer?), selection (which groups train?).
"""

from longrl.algorithms.advantages import (
    Outcomes,
    batch_normalized,
    greedy_centered,
    group_centered,
    group_centered_batch_normalized,
    group_normalized,
    leave_one_out,
    raw,
)
from longrl.algorithms.algorithm import Algorithm, LossOutput
from longrl.algorithms.corrections import (
    masked_sequence,
    masked_token,
    no_correction,
    truncated_sequence,
    truncated_token,
)
from longrl.algorithms.kl import gaussian_mean, k1, k2, k3
from longrl.algorithms.selection import InOrder, drop_uniform, keep_all, mask_truncated
from longrl.algorithms.surrogates import (
    DualClipped,
    TokenLosses,
    cispo,
    clipped,
    grpo_guard,
    reinforce,
    sequence_clipped,
)
from longrl.algorithms.token_weights import Constant, sequence_mean, token_mean
from longrl.algorithms.tokens import AllReduce, DrawnSteps, Tokens, single_rank

__all__ = [
    "Algorithm",
    "AllReduce",
    "Constant",
    "DrawnSteps",
    "DualClipped",
    "InOrder",
    "LossOutput",
    "Outcomes",
    "TokenLosses",
    "Tokens",
    "batch_normalized",
    "cispo",
    "clipped",
    "drop_uniform",
    "gaussian_mean",
    "greedy_centered",
    "group_centered",
    "group_centered_batch_normalized",
    "group_normalized",
    "grpo_guard",
    "k1",
    "k2",
    "k3",
    "keep_all",
    "leave_one_out",
    "mask_truncated",
    "masked_sequence",
    "masked_token",
    "no_correction",
    "raw",
    "reinforce",
    "sequence_clipped",
    "sequence_mean",
    "single_rank",
    "token_mean",
    "truncated_sequence",
    "truncated_token",
]
