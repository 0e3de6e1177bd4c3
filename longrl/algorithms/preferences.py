"""Objectives on pairs: of two answers to one prompt one is preferred, and the policy learns which.

Letters: P pairs of an optimizer step on this rank. Scores of an answer are sums over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.number_ranges import LEAST, MOST, NOT_NEGATIVE, check_ranges


@dataclass(frozen=True)
class PairScores:
    """What is known of P pairs; every field is [P]. Only `chosen_logp` and `rejected_logp` carry a gradient."""

    chosen_logp: Tensor
    """Log-probability of the better answer under the policy."""
    rejected_logp: Tensor
    chosen_ref: Tensor
    """The same under the reference policy; zeros where there is none."""
    rejected_ref: Tensor
    chosen_tokens: Tensor
    """Number of them."""
    rejected_tokens: Tensor

    @cached_property
    def chosen_ratio(self) -> Tensor:
        """Log-ratio of policy and reference, h_c."""
        return self.chosen_logp - self.chosen_ref

    @cached_property
    def rejected_ratio(self) -> Tensor:
        """Likewise of the other answer, h_r."""
        return self.rejected_logp - self.rejected_ref


# ---- losses of a pair ----
# A loss is `(pairs, beta) -> [P]`. With h the log-ratio of an answer, |y| its tokens, s the logistic function. One that
# reads no reference says so by `needs_reference = False`.


def dpo(pairs: PairScores, beta: float) -> Tensor:
    """-log s(beta (h_c - h_r)): DPO, arXiv:2305.18290, eq. 7."""
    return -logsigmoid(beta * (pairs.chosen_ratio - pairs.rejected_ratio))


@dataclass(frozen=True)
class SmoothedDPO:
    """DPO where a share of the pairs is labelled the wrong way round: the mean of both labels' losses by that share.

    Conservative DPO, arXiv:2305.18290 with the label smoothing that its authors' code has (`label_smoothing` of TRL).
    """

    label_smoothing: float = 0.1
    """The share, below 0.5."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"the label_smoothing of SmoothedDPO must be at least 0 and below 0.5, got {self.label_smoothing}; at "
                "0.5 nothing is preferred"
            )

    def __call__(self, pairs: PairScores, beta: float) -> Tensor:
        """The loss of each pair."""
        margin = beta * (pairs.chosen_ratio - pairs.rejected_ratio)
        return -(1 - self.label_smoothing) * logsigmoid(margin) - self.label_smoothing * logsigmoid(-margin)


def ipo(pairs: PairScores, beta: float) -> Tensor:
    """(h_c / |y_c| - h_r / |y_r| - 1 / (2 beta))^2: IPO, arXiv:2310.12036, eq. 17, with beta in the place of tau.

    Log-ratios are means over tokens, as in TRL, whose authors have it from the paper's; else long answers would have
    all of the loss. Their size is then that of one token: beta is taken larger than DPO's or training longer.
    """
    margin = pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens
    return (margin - 1 / (2 * beta)).square()


def length_normalized_dpo(pairs: PairScores, beta: float) -> Tensor:
    """-log s(beta (h_c / |y_c| - h_r / |y_r|)): DPO by the token (Tulu 3, arXiv:2411.15124, eq. 6); beta is 2 to 10."""
    return -logsigmoid(beta * (pairs.chosen_ratio / pairs.chosen_tokens - pairs.rejected_ratio / pairs.rejected_tokens))


@dataclass(frozen=True)
class SimPO:
    """-log s(beta (logp_c / |y_c| - logp_r / |y_r|) - gamma): SimPO, arXiv:2405.14734, eq. 6, without a reference.

    The paper takes beta 2 to 10.
    """

    gamma: float = 1.0
    """The margin that is wanted; the paper takes 0.3 to 1.6."""
    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, "the loss SimPO: ", gamma=NOT_NEGATIVE)

    def __call__(self, pairs: PairScores, beta: float) -> Tensor:
        """The loss of each pair."""
        chosen = pairs.chosen_logp / pairs.chosen_tokens
        rejected = pairs.rejected_logp / pairs.rejected_tokens
        return -logsigmoid(beta * (chosen - rejected) - self.gamma)


def bco(pairs: PairScores, beta: float, shift: float = 0.0) -> Tensor:
    """-log s(beta h_c - shift) - log s(-(beta h_r - shift)): how good each answer is by itself.

    BCO, arXiv:2404.04656, and the quality loss of MPO, arXiv:2411.10442, eq. 6 to 8, which adds both answers' terms.

    Args:
        pairs: the pairs.
        beta: of the rewards beta h.
        shift: delta, the mean reward of earlier steps.
    """
    return -logsigmoid(beta * pairs.chosen_ratio - shift) - logsigmoid(shift - beta * pairs.rejected_ratio)


def generation(pairs: PairScores) -> Tensor:
    """-logp_c / |y_c|: negative log-likelihood of the better answer by the token, MPO, arXiv:2411.10442, eq. 9."""
    return -pairs.chosen_logp / pairs.chosen_tokens


# ---- the objective ----

PairLoss = Callable[[PairScores, float], Any]  # -> Tensor [P]


@dataclass(frozen=True)
class Preference:
    """An objective on pairs: w_p loss + w_q bco + w_g generation, the mean over pairs. The default is DPO.

    MPO (arXiv:2411.10442) is `{preference_weight: 0.8, quality_weight: 0.2, generation_weight: 1.0}`. In YAML a loss is
    its import path or `file.py:function`, and one with settings a `class_path` with `init_args`; `configs/preference/`
    has one file per paper.
    """

    loss: FunctionOrPath[PairLoss] = dpo
    """Loss of a pair: a function of longrl/algorithms/preferences.py, or your own."""
    beta: float = 0.1
    """Scale of log-ratios: large ones hold the policy near its reference."""
    preference_weight: float = 1.0
    """Factor w_p of `loss`."""
    quality_weight: float = 0.0
    """Factor w_q of `bco`, whose shift is the mean reward of all pairs before the step."""
    generation_weight: float = 0.0
    """Factor w_g of `generation`, the SFT loss of the chosen answer."""

    def __post_init__(self) -> None:
        loss = resolve_function(self.loss, "model.preference.loss", ("pairs", "beta"))
        object.__setattr__(self, "loss", loss)
        weights = ("preference_weight", "quality_weight", "generation_weight")
        check_ranges(self, "model.preference.", beta=(LEAST, MOST), **dict.fromkeys(weights, NOT_NEGATIVE))
        if not self.preference_weight + self.quality_weight:
            raise ValueError(
                "model.preference has a preference_weight and a quality_weight of 0, which learns no preference; raise "
                "one, or set data.stage to sft"
            )

    @property
    def needs_reference(self) -> bool:
        """True if the policy that the run began with is scored, too."""
        of_loss = self.preference_weight > 0 and getattr(self.loss, "needs_reference", True)
        return of_loss or self.quality_weight > 0

    def losses(self, pairs: PairScores, shift: float) -> dict[str, Tensor]:
        """The parts that have a weight, without it: `preference`, `quality`, `generation`, [P] each.

        Args:
            pairs: the pairs.
            shift: of `bco`.
        """
        parts = {}
        if self.preference_weight:
            parts["preference"] = self.loss(pairs, self.beta)
        if self.quality_weight:
            parts["quality"] = bco(pairs, self.beta, shift)
        if self.generation_weight:
            parts["generation"] = generation(pairs)
        return parts

    def weight(self, part: str) -> float:
        """That of a part of `losses`."""
        weight: float = getattr(self, f"{part}_weight")
        return weight

    def rewards(self, pairs: PairScores) -> tuple[Tensor, Tensor]:
        """[P] and [P]: the implicit rewards of both answers, beta h; without a reference beta logp / |y|."""
        if self.needs_reference:
            return self.beta * pairs.chosen_ratio, self.beta * pairs.rejected_ratio
        chosen = self.beta * pairs.chosen_logp / pairs.chosen_tokens
        rejected = self.beta * pairs.rejected_logp / pairs.rejected_tokens
        return chosen, rejected
