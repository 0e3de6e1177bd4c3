"""Mismatch of engine and trainer in the log-probabilities of the tokens that the engine drew.

Letters: N tokens of a rollout, completion after completion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from longrl.modules.staleness import mismatch_by_staleness
from longrl.strategies.axis import SINGLE_RANK, Axis

METRICS = ("mean", "max", "k3", "effective_share")  # of `Mismatch.metrics`


@dataclass(frozen=True)
class Mismatch:
    """Difference of engine and trainer in the log-probabilities of the engine's tokens."""

    engine_logp: Tensor
    """[N] log-probabilities the engine reported."""
    trainer_logp: Tensor
    """[N] of the same tokens under the trainer's forward pass."""

    def metrics(self, world: Axis = SINGLE_RANK) -> dict[str, float]:
        """Mean and largest absolute difference, k3 estimate of KL(engine || trainer), share of effective samples.

        k3 is exp(d) - 1 - d with d trainer less engine; the effective sample size is that of importance weights exp(d)
        (Kong 1992), as a share of the number of tokens. Tokens without a finite score do not count; without any token
        there are no metrics.

        Args:
            world: ranks whose tokens count together; all must call it.
        """
        difference = self.trainer_logp - self.engine_logp  # [N]
        difference = difference[difference.isfinite()].double()
        difference = difference.clamp(-20, 20)  # one token must not make exp(d) infinite
        distance = difference.abs()
        weights = difference.exp()
        sums = world.sum_dict(
            {
                "tokens": float(len(difference)),
                "distance": float(distance.sum()),
                "k3": float((weights - 1 - difference).sum()),
                "weights": float(weights.sum()),
                "squares": float(weights.square().sum()),
            }
        )
        local_largest = float(distance.max()) if len(distance) else 0.0
        largest = world.max(local_largest)
        tokens = sums["tokens"]
        if not tokens:
            return {}
        effective_share = sums["weights"] ** 2 / (sums["squares"] * tokens)
        return {
            "mean": sums["distance"] / tokens,
            "max": largest,
            "k3": sums["k3"] / tokens,
            "effective_share": effective_share,
        }


class MismatchMonitor:
    """Measures the mismatch in the first forward pass of every rollout; ends a run whose engine has left the trainer.

    The first mini-batch is scored by the weights that sampled it, so measuring costs nothing.

    Args:
        max_mismatch: largest mean difference of a step; above it the run ends before its weights change.
        bypass_below: while the mean of the last rollout is below it, the engine's log-probabilities serve as the old
            policy's, and the pass that computes those is left out; 0 never.
        max_staleness: of `rollout.max_staleness`. At 1 completions come from weights one step older, and the step
            between is part of the mismatch; above, tokens of older weights have metrics of their own and end no run.
    """

    def __init__(self, max_mismatch: float = 0.1, bypass_below: float = 0.0, max_staleness: int = 0) -> None:
        self.max_mismatch = max_mismatch
        self.bypass_below = bypass_below
        self.max_staleness = max_staleness
        self.last_mean: float | None = None
        """Mean difference of the last rollout."""
        self.metrics: dict[str, float] = {}
        """Of the last rollout: `mismatch_mean`, `mismatch_max`, `mismatch_k3`, `mismatch_effective_share`; and with
        `max_staleness` `mismatch_mean_staleness_D` of tokens that are D rollouts old."""
        self._engine_logps: list[Tensor] = []
        self._trainer_logps: list[Tensor] = []
        self._staleness: list[Tensor] = []

    @property
    def bypasses_old_logp(self) -> bool:
        """True while the engine's log-probabilities may stand for the old policy's."""
        return self.last_mean is not None and self.last_mean < self.bypass_below

    def add_tokens(self, engine_logp: Tensor, trainer_logp: Tensor, staleness: Tensor) -> None:
        """Some tokens of this rollout, all [N]; 0 rollouts old are those that the weights of the trainer drew."""
        self._engine_logps.append(engine_logp.detach())
        self._trainer_logps.append(trainer_logp.detach())
        self._staleness.append(staleness)

    def finish_rollout(self, world: Axis) -> None:
        """Sets `metrics` from what was added on all ranks; a token may be counted by several of them, then all are.

        Raises:
            RuntimeError: the mean difference is above `max_mismatch`.
        """
        none = [torch.zeros(0)]  # a rank may have scored no token
        engine_logp = torch.cat(self._engine_logps or none).cpu()  # [N]
        trainer_logp = torch.cat(self._trainer_logps or none).cpu()  # [N]
        staleness = torch.cat(self._staleness or none).cpu()  # [N]
        self._engine_logps.clear()
        self._trainer_logps.clear()
        self._staleness.clear()
        is_compared = (staleness == 0) | (self.max_staleness == 1)  # [N]
        # Without a score a token does not count.
        metrics = Mismatch(engine_logp.where(is_compared, math.nan), trainer_logp).metrics(world)
        self.last_mean = metrics.get("mean", self.last_mean)
        # Lightning goes on logging the last value of a metric that is left out.
        named = {name: metrics.get(name, math.nan) for name in METRICS}
        if self.max_staleness:
            distance = (trainer_logp - engine_logp).abs()  # [N]
            named |= mismatch_by_staleness(distance, staleness, self.max_staleness, world)
        self.metrics = {f"mismatch_{name}": value for name, value in named.items()}
        if metrics and metrics["mean"] > self.max_mismatch:
            raise RuntimeError(
                self.failure_message(", ".join(f"{name} {value:.3g}" for name, value in metrics.items()))
            )

    def failure_message(self, metrics: str) -> str:
        """Error message of a run above `max_mismatch`."""
        return (
            f"engine and trainer have parted: the log-probabilities of this step's tokens differ by {metrics}, "
            f"mean above max_mean_mismatch={self.max_mismatch}; this step did not change the weights. Go on from the "
            "last checkpoint with --ckpt_path RUN/checkpoints/last.ckpt: engine weights are handed over anew. If it "
            "happens again raise rollout.max_mean_mismatch, or use longrl.engines.hf.HFEngine"
        )
