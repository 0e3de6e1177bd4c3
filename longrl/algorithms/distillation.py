"""Distillation: how far the policy's next tokens are from a teacher's, as a loss or as a reward of each token.

Letters: R rows, of which each predicts a token; N tokens of a rollout; V vocabulary; k tokens that the teacher finds
likeliest.

With p the teacher's distribution and q the policy's, both of one row (Agarwal et al., GKD, arXiv:2306.13649, sec. 2):

    reverse_kl      KL(q || p) = sum q (log q - log p)
    forward_kl      KL(p || q) = sum p (log p - log q)
    jensen_shannon  beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    sampled         log q - log p of the token that was sampled: an estimate of the reverse KL, from one number of the
                    teacher's
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longrl.algorithms.losses import log_ratio
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges

Divergence = Literal["sampled", "reverse_kl", "forward_kl", "jensen_shannon"]


@dataclass(frozen=True)
class Distillation:
    """The term that a teacher adds to the objective.

    Example:
        `Distillation("sampled", placement="advantage")` rewards each token by teacher_logp - old_logp, beside the
        other rewards; with `advantage: longrl.algorithms.no_advantage` in their place.
    """

    divergence: Divergence = "reverse_kl"
    """`sampled` needs the teacher's log-probability of each token alone, the others its distributions. In the loss it
    has importance weights, truncated at the algorithm's `correction_cap`, in later updates and of older weights."""
    coef: float = 1.0
    """Factor of distillation beside the algorithm's own loss or reward."""
    placement: Literal["loss", "advantage"] = "loss"
    """`loss`: a term with its own gradient. `advantage`: coef * (teacher_logp - old_logp) is added to the advantage of
    each token, a reward of discount 0 (no token answers for later ones); with `sampled` alone."""
    top_k: int | None = None
    """The teacher's likeliest tokens that are compared; all others are one further token, in both distributions. None
    is the whole vocabulary."""
    beta: float = 0.5
    """Of `jensen_shannon`: the weight of the teacher in the mixture; towards 0 the forward KL, towards 1 the reverse,
    each times a factor that goes to 0."""
    temperature: float | None = None
    """The teacher's; None is the policy's own, at which completions are sampled."""
    sft_coef: float = 1.0
    """Of the SFT stage: factor of the loss on the stored text, beside the term."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.distillation.", coef=NOT_NEGATIVE, sft_coef=NOT_NEGATIVE)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"model.distillation.top_k must be at least 1, got {self.top_k}; 64 is usual, null is the whole "
                "vocabulary"
            )
        if not 0 < self.beta < 1:
            raise ValueError(
                f"model.distillation.beta must be above 0 and below 1, got {self.beta}; for the ends set "
                "model.distillation.divergence to forward_kl or reverse_kl"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"model.distillation.temperature must be above 0, got {self.temperature}; null is the policy's own"
            )
        if self.divergence == "sampled" and self.top_k is not None:
            raise ValueError(
                f"model.distillation.divergence=sampled compares the sampled token alone, got top_k={self.top_k}; set "
                "model.distillation.top_k to null, or divergence to reverse_kl"
            )
        if self.divergence != "sampled" and self.placement == "advantage":
            raise ValueError(
                "model.distillation.placement=advantage rewards the tokens that were sampled, got "
                f"divergence={self.divergence}; set model.distillation.divergence to sampled, or placement to loss"
            )

    @property
    def needs_distribution(self) -> bool:
        """True if a teacher's log-probability of the sampled token is not enough."""
        return self.divergence != "sampled"

    def of_rows(self, policy: Tensor, teacher: Tensor) -> Tensor:
        """[R] divergences, with a gradient of the policy's log-probabilities.

        Args:
            policy: [R, V] log q.
            teacher: [R, V] log p of the same tokens.
        """
        if self.divergence == "reverse_kl":
            return kl_divergence(policy, teacher)
        if self.divergence == "forward_kl":
            return kl_divergence(teacher, policy)
        assert self.divergence == "jensen_shannon"
        weighted = teacher + math.log(self.beta)
        mixture = torch.logaddexp(weighted, policy + math.log1p(-self.beta))
        from_teacher = kl_divergence(teacher, mixture)
        from_policy = kl_divergence(policy, mixture)
        return self.beta * from_teacher + (1 - self.beta) * from_policy

    def of_samples(
        self, logp: Tensor, teacher_logp: Tensor, drawn_logp: Tensor | None = None, cap: float = 2.0
    ) -> Tensor:
        """[R] losses of sampled tokens: (log q - log p)^2 / 2, whose gradient is that of the reverse KL on average.

        So it is for tokens that the policy itself has sampled (k2, http://joschu.net/blog/kl-approx.html); the estimate
        log q - log p would have the gradient of log q alone, which is 0 on average. In later updates, and of older
        weights, another policy has drawn them: there each is weighed by min(q / that policy, cap), held constant.

        Args:
            logp: [R] of the policy, with gradient.
            teacher_logp: [R].
            drawn_logp: [R] of the policy that drew the tokens; None is the policy itself.
            cap: of the weights.
        """
        losses = 0.5 * (logp - teacher_logp).square()
        if drawn_logp is None:
            return losses
        return log_ratio(logp.detach(), drawn_logp).exp().clamp(max=cap) * losses

    def token_rewards(self, old_logp: Tensor, teacher_logp: Tensor) -> Tensor:
        """[N] coef * (log p - log q): on average over samples -coef * KL(q || p) of the token's own distribution."""
        return self.coef * (teacher_logp - old_logp)

    def teacher_temperature(self, temperature: float) -> float:
        """The teacher's, where the policy samples with `temperature`; greedy counts as 1."""
        return self.temperature or temperature or 1.0


def kl_divergence(first: Tensor, second: Tensor) -> Tensor:
    """[R] KL(first || second) = sum of e^first (first - second).

    Args:
        first: [R, V] log-probabilities.
        second: [R, V].
    """
    return (first.exp() * (first - second)).sum(-1)
