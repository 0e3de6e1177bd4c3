"""RL objectives as a record of orthogonal pure functions; configs/algorithm/ names the combinations of the papers.

A file for each question: advantages (groups and completions: which train, and what was one worth? also reward_parts,
optimal_baselines and task_scaling), losses (tokens: what does one add to the loss, and how much does it count?
sequence_surrogates looks at completions), corrections (did the engine that sampled a token agree with the trainer?),
top_entropy (which tokens learn?), distillation (how far is a teacher?), preferences (which answer is better?), control
(what moves from rollout to rollout?), algorithm (the record of one function per question). What a function needs of a
run is said by the function, needs, and checked before weights are loaded, checks. docs/algorithms.md lists them all.
"""

from longrl.algorithms.advantages import (
    InOrder as InOrder,
    Outcomes as Outcomes,
    batch_normalized as batch_normalized,
    drop_uniform as drop_uniform,
    greedy_centered as greedy_centered,
    group_centered as group_centered,
    group_centered_batch_normalized as group_centered_batch_normalized,
    group_centered_global_std as group_centered_global_std,
    group_centered_rescaled as group_centered_rescaled,
    group_normalized as group_normalized,
    keep_all as keep_all,
    leave_one_out as leave_one_out,
    mask_truncated as mask_truncated,
    mask_truncated_loss as mask_truncated_loss,
    no_advantage as no_advantage,
    raw as raw,
)
from longrl.algorithms.algorithm import Algorithm as Algorithm, LossOutput as LossOutput
from longrl.algorithms.checks import function_needs as function_needs
from longrl.algorithms.control import (
    EntropyControl as EntropyControl,
    KLControl as KLControl,
    MovingReference as MovingReference,
)
from longrl.algorithms.corrections import (
    CorrectionProduct as CorrectionProduct,
    GeometricMask as GeometricMask,
    OffPolicySequenceMask as OffPolicySequenceMask,
    TwoSidedMask as TwoSidedMask,
    masked_sequence as masked_sequence,
    masked_token as masked_token,
    no_correction as no_correction,
    truncated_sequence as truncated_sequence,
    truncated_token as truncated_token,
)
from longrl.algorithms.denoising import (
    gaussian_mean as gaussian_mean,
    gaussian_mean_rate as gaussian_mean_rate,
    grpo_guard as grpo_guard,
)
from longrl.algorithms.distillation import Distillation as Distillation
from longrl.algorithms.losses import (
    AllReduce as AllReduce,
    BoundedK3 as BoundedK3,
    Constant as Constant,
    DrawnSteps as DrawnSteps,
    DualClipped as DualClipped,
    SoftGated as SoftGated,
    StaleClipped as StaleClipped,
    TokenLosses as TokenLosses,
    Tokens as Tokens,
    cispo as cispo,
    clipped as clipped,
    k1 as k1,
    k2 as k2,
    k3 as k3,
    k3_unbiased as k3_unbiased,
    reinforce as reinforce,
    sequence_mean as sequence_mean,
    single_rank as single_rank,
    token_mean as token_mean,
)
from longrl.algorithms.needs import Needs as Needs, needs as needs
from longrl.algorithms.optimal_baselines import (
    length_centered as length_centered,
    optimal_token_baseline as optimal_token_baseline,
)
from longrl.algorithms.preferences import (
    PairScores as PairScores,
    Preference as Preference,
    SimPO as SimPO,
    SmoothedDPO as SmoothedDPO,
    dpo as dpo,
    ipo as ipo,
    length_normalized_dpo as length_normalized_dpo,
)
from longrl.algorithms.reward_parts import part_normalized as part_normalized
from longrl.algorithms.sequence_surrogates import (
    SequenceDualClipped as SequenceDualClipped,
    geometric_clipped as geometric_clipped,
    sequence_clipped as sequence_clipped,
)
from longrl.algorithms.task_scaling import TaskNormalized as TaskNormalized
from longrl.algorithms.top_entropy import HighEntropy as HighEntropy, high_entropy as high_entropy
