"""How evenly a mixture's experts are used in a training step, and where engine and trainer choose otherwise.

Letters: M layers with a mixture of E experts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrl.strategies.axis import Axis
from longrl.types import ExpertLoad, Metrics


class ExpertLoads:
    """Sums over the micro-batches of a step's updates.

    Every row counts: prompts and completions, a prompt that is repeated in several micro-batches in each of them.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] | None = None

    def add(self, load: ExpertLoad | None, counts: bool = True) -> None:
        """Adds that of a micro-batch; None of a model without experts. One that does not count says the shapes."""
        if load is None:
            return
        parts = [part if counts else torch.zeros_like(part) for part in load]
        if self._sums is not None:
            parts = [total + part for total, part in zip(self._sums, parts, strict=True)]
        self._sums = parts

    def metrics(self, world: Axis) -> Metrics:
        """See `load_metrics`, of all ranks' rows; every rank must call it. Nothing without experts."""
        if self._sums is None:
            return {}
        tokens, replayed, differing = self._sums
        flat = world.sum(torch.cat([tokens.flatten(), replayed[None], differing[None]])).cpu()
        return load_metrics(ExpertLoad(flat[:-2].view_as(tokens), flat[-2], flat[-1]))


def load_metrics(load: ExpertLoad) -> Metrics:
    """Metrics of a step; nan where nothing was counted.

    Args:
        load: sums over all rows of all ranks.

    Returns:
        `expert_max_violation`: the busiest expert's tokens above the mean, as a share of it, mean over layers (MaxVio,
        arXiv:2408.15664); 0 is even. `expert_entropy`: of the load, as a share of an even one's, mean over layers.
        `experts_unused`: share of all layers' experts without a token. `router_replayed`: share of choices that were
        the engine's; `router_mismatch`: share of those that the trainer would not have made.
    """
    tokens = load.tokens  # [M, E]
    num_experts = tokens.shape[1]
    all_choices = float(tokens.sum()) or math.nan
    shares = tokens / tokens.sum(1, keepdim=True)  # [M, E]
    entropy = torch.special.entr(shares).sum(1) / math.log(max(num_experts, 2))  # [M]
    return {
        "expert_max_violation": float((shares.amax(1) * num_experts - 1).mean()),
        "expert_entropy": float(entropy.mean()),
        "experts_unused": float((tokens == 0).double().mean()),
        "router_replayed": float(load.replayed) / all_choices,
        "router_mismatch": float(load.differing) / (float(load.replayed) or math.nan),
    }
