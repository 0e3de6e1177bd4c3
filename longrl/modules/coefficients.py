"""Coefficients of the objective that move from rollout to rollout: state of a run, the same on all of its ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longrl.algorithms import Algorithm
from longrl.types import Metrics


class Coefficients:
    """The KL and the entropy coefficient of a run, as far as a control of the algorithm moves them.

    A rollout whose metric is not finite, since a step of it was left out, moves nothing, nor does one of which no
    completion is in the loss.

    Args:
        algorithm: with the coefficients to begin with, and the controls.

    Example:
        ```python
        coefficients = Coefficients(algorithm)
        algorithm = coefficients.of(algorithm)                 # the objective of this rollout
        coefficients.follow({"kl_ref": 0.02, "entropy": 0.3}, num_completions=64)
        ```
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.kl_control = algorithm.kl_control
        self.entropy_control = algorithm.entropy_control
        self.kl = algorithm.kl_coef
        self.entropy = algorithm.entropy_coef
        self.has_bonus = True
        """False while entropy is above its target, where the bonus is off whatever `entropy` is."""

    def of(self, algorithm: Algorithm) -> Algorithm:
        """The algorithm with the coefficients of the next rollout; the same one if nothing moves them."""
        if self.kl_control is not None:
            algorithm = replace(algorithm, kl_coef=self.kl)
        if self.entropy_control is not None:
            algorithm = replace(algorithm, entropy_coef=self.entropy if self.has_bonus else 0.0)
        return algorithm

    def follow(self, metrics: Mapping[str, float], num_completions: int) -> None:
        """Moves the coefficients after a rollout.

        Args:
            metrics: of its updates over all ranks: `kl_ref` and `entropy`.
            num_completions: of the rollout on all ranks, those in the loss.
        """
        if not num_completions:
            return
        kl = metrics.get("kl_ref", math.nan)
        if self.kl_control is not None and math.isfinite(kl):
            self.kl = self.kl_control.next(self.kl, kl, num_completions)
        entropy = metrics.get("entropy", math.nan)
        if self.entropy_control is not None and math.isfinite(entropy):
            self.entropy = self.entropy_control.next(self.entropy, entropy)
            self.has_bonus = self.entropy_control.applies(entropy)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must have, empty without a control."""
        state: dict[str, Any] = {}
        if self.kl_control is not None:
            state["kl"] = self.kl
        if self.entropy_control is not None:
            state |= {"entropy": self.entropy, "has_bonus": self.has_bonus}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse; what is missing begins as the algorithm says, and what no control moves stays as it says."""
        if self.kl_control is not None:
            self.kl = state.get("kl", self.kl)
        if self.entropy_control is not None:
            self.entropy = state.get("entropy", self.entropy)
            self.has_bonus = state.get("has_bonus", self.has_bonus)


def coefficient_metrics(algorithm: Algorithm) -> Metrics:
    """Of the rollout that `algorithm` trained: `kl_coef` if a control moves it, `entropy_coef` if there is a bonus."""
    metrics = {}
    if algorithm.kl_control is not None:
        metrics["kl_coef"] = algorithm.kl_coef
    if algorithm.entropy_control is not None or algorithm.entropy_coef:
        metrics["entropy_coef"] = algorithm.entropy_coef
    return metrics
