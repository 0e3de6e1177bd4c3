"""The micro-batches of a planned step: how many groups, completions and tokens are in one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longrl.planning.inputs import Plan


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a step."""

    groups: int
    completions: int
    """Completions of each group; fewer than G if the group is split."""
    count: int
    """Micro-batches of a rank in one pass over the rollout."""
    tokens: int
    """Tokens of all ranks that share it."""
    scored: int
    """R of all ranks that share it."""

    def local_rows(self, plan: Plan) -> int:
        """Rows on one rank."""
        return math.ceil(self.tokens / plan.sequence_parallel_size)


def micro_batch(plan: Plan) -> MicroBatch:
    """The micro-batch that `longrl.packing.pack.pack` makes of prompts that are all alike.

    Raises:
        ValueError: a prompt with one completion is over the budget.
    """
    budget = plan.max_tokens_per_micro_batch * plan.sequence_parallel_size
    prompts = math.ceil(plan.prompts_per_batch / plan.mini_batches)
    turns = plan.sp_group // plan.sequence_parallel_size
    prompt, completion = plan.prompt_tokens, plan.completion_tokens
    if prompt + completion > budget:
        raise ValueError(
            f"a prompt of {prompt} tokens with one completion of {completion} must fit into "
            f"model.max_tokens_per_micro_batch times sequence_parallel_size, got {plan.max_tokens_per_micro_batch} "
            f"times {plan.sequence_parallel_size}; raise model.max_tokens_per_micro_batch to "
            f"{needed_budget(plan)}, or lower data.video.max_frames"
        )
    groups = min(prompts, max(1, budget // (prompt + plan.num_generations * completion)))
    completions = min(plan.num_generations, (budget // groups - prompt) // completion)
    count = math.ceil(prompts / groups) * math.ceil(plan.num_generations / completions) * plan.mini_batches
    tokens = groups * (prompt + completions * completion)
    scored = groups * completions * plan.sampled_tokens
    return MicroBatch(groups, completions, math.ceil(count / turns), tokens, scored)


def needed_budget(plan: Plan) -> int:
    """The least `max_tokens_per_micro_batch` with which a prompt is computed once for all its completions."""
    return math.ceil((plan.prompt_tokens + plan.num_generations * plan.completion_tokens) / plan.sequence_parallel_size)
