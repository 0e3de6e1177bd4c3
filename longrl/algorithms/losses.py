"""The parts of the loss: surrogate and KL estimate of each token, and the weights of their sum.

Letters: R tokens of a micro-batch, whose log-probabilities are scored; C completions of an optimizer step; D numbers
of a latent, where rows are denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from longrl.algorithms.needs import Needs, needs
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.number_ranges import LIMIT_OR_ZERO, check_ranges

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20, so that exp stays finite; beyond it the gradient is zero."""


def log_ratio(logp: Tensor, other_logp: Tensor) -> Tensor:
    """`logp - other_logp` within +-20; shapes [R]."""
    return (logp - other_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the data-parallel ranks."""


def single_rank(values: Tensor) -> Tensor:
    """The `AllReduce` of one process."""
    return values


@dataclass(frozen=True)
class DrawnSteps:
    """Rows that are denoising steps: what was drawn is a latent of D numbers around a mean.

    Log-probabilities of such rows are means over the D numbers (longrl/diffusion/steps.py).
    """

    mean: Tensor
    """[R, D] under the policy being updated, with gradient."""
    std: Tensor
    """[R] deviation of the noise."""
    length: Tensor
    """[R] how far sigma falls in the step, above 0."""
    old_mean: Tensor
    """[R, D] under the policy before the updates."""
    ref_mean: Tensor | None = None
    """Likewise under the reference policy."""


@dataclass(frozen=True)
class Tokens:
    """Scored completion tokens; every field is [R]. Only `logp` carries a gradient."""

    logp: Tensor
    """Under the policy being updated."""
    old_logp: Tensor
    """Under the policy before the updates on this rollout."""
    advantages: Tensor
    completion_index: Tensor
    """Which completion a row belongs to; all rows of a completion are here, in any order."""
    sampler_logp: Tensor | None = None
    """As the rollout engine reported it."""
    steps: DrawnSteps | None = None
    """The steps behind a diffusion model's rows."""
    stale: Tensor | None = None
    """bool: older weights than those before the updates drew the token; None is nowhere."""

    @cached_property
    def ratio(self) -> Tensor:
        """Policy / old policy, its log within +-20."""
        return log_ratio(self.logp, self.old_logp).exp()

    def completion_sum(self, values: Tensor) -> Tensor:
        """Each row gets the sum over the rows of its completion."""
        # float64: the order in which a GPU adds does not show after rounding
        sums = torch.zeros_like(values, dtype=torch.float64).index_add(0, self._place, values.double())
        return sums[self._place].to(values.dtype)

    def completion_mean(self, values: Tensor) -> Tensor:
        """Likewise the mean."""
        return self.completion_sum(values) / self.completion_sum(torch.ones_like(values))

    @cached_property
    def _place(self) -> Tensor:
        """[R] numbers from 0 on instead of the completions'. `unique` would have a GPU waited for."""
        ids, order = self.completion_index.sort()
        is_next = torch.ones_like(ids)
        is_next[1:] = ids[1:] != ids[:-1]
        return torch.empty_like(ids).scatter(0, order, is_next.cumsum(0) - 1)


# ---- surrogates ----
# With rho = policy / old policy at a token, A its advantage and sg stop-gradient. A surrogate is
# `(tokens, clip_low, clip_high) -> TokenLosses`. On the first update after a rollout rho is 1, nothing is clipped, and
# the gradient of every surrogate here is that of `reinforce`. Later updates, groups that were carried over and those of
# `rollout.max_staleness` have another rho: one of your own that does not read it must say so,
# `@needs(one_update=True)`. The range is two numbers, or one of each token ([R], `StaleClipped`).

Surrogate = Callable[[Tokens, Any, Any], Any]  # (tokens, clip_low, clip_high) -> TokenLosses


@dataclass(frozen=True)
class TokenLosses:
    """Loss of each token, and where the clip was at work."""

    loss: Tensor
    """[R] to be minimised."""
    clipped_low: Tensor
    """[R] bool: the ratio was below the range, and clipping changed the gradient."""
    clipped_high: Tensor
    """Likewise above."""


def clipped(tokens: Tokens, clip_low: float, clip_high: float, ratio: Tensor | None = None) -> TokenLosses:
    """L = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A): PPO, arXiv:1707.06347, eq. 7, and GRPO.

    Two bounds are the clip-higher of DAPO, arXiv:2503.14476, sec. 3.1. Surrogates with another `ratio` than that of
    the tokens, [R], pass it on.
    """
    ratio = tokens.ratio if ratio is None else ratio
    advantages = tokens.advantages
    low = 1 - clip_low
    high = 1 + clip_high
    objective = torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return TokenLosses(-objective, (advantages < 0) & (ratio < low), (advantages > 0) & (ratio > high))


@dataclass(frozen=True)
class DualClipped:
    """Dual-clip PPO, arXiv:1912.09729: for A < 0 the objective is max(min(rho A, clip(rho) A), c A), c = 3.

    So a bad token of a far too high ratio gets no gradient (counted in `clipped_high`); for A >= 0 this is `clipped`.
    TRL's `delta` (arXiv:2505.07291), a cap on rho before the minimum, is c where delta >= 1 + clip_high; below, it
    lowers the upper clip, too.
    """

    bound: float = 3.0
    """c, above 1."""

    def __post_init__(self) -> None:
        if not self.bound > 1:
            raise ValueError(f"the bound of DualClipped must be above 1, got {self.bound}; the paper has 3")

    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
        """The loss of each token."""
        plain = clipped(tokens, clip_low, clip_high)
        negative = tokens.advantages < 0  # [R]
        capped = torch.minimum(plain.loss, -self.bound * tokens.advantages)
        clipped_high = plain.clipped_high | (negative & (tokens.ratio > self.bound))
        return replace(plain, loss=torch.where(negative, capped, plain.loss), clipped_high=clipped_high)


def cispo(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """L = -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log policy: CISPO, MiniMax-M1, arXiv:2506.13585.

    No token loses its gradient; whatever the sign of A, its weight is held in the range. Both sides are clamped, as in
    the paper's formula, verl and EasyR1; the paper then gives up the lower side, which is `clip_low: 1.0` here and the
    only form TRL and ms-swift have. Mind that their `epsilon_high` is the bound itself: 5 there is `clip_high: 4` here.
    """
    ratio = tokens.ratio.detach()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return TokenLosses(-weight * tokens.advantages * tokens.logp, ratio < 1 - clip_low, ratio > 1 + clip_high)


def reinforce(tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
    """L = -sg(min(rho, 1 + clip_high)) A log policy: REINFORCE (Williams 1992), RLOO and ReMax.

    The papers take one step on what its own weights have sampled: there rho is 1 exactly. In later updates, and for
    groups of older weights, it is each token's importance weight, truncated. `clip_low` is not read.
    """
    ratio = tokens.ratio.detach()
    weight = ratio.clamp(max=1 + clip_high)
    never = torch.zeros_like(ratio, dtype=torch.bool)
    return TokenLosses(-weight * tokens.advantages * tokens.logp, never, ratio > 1 + clip_high)


TEMPERATURE = (1e-3, 1e3)
"""Range of the temperatures of `SoftGated`."""


@dataclass(frozen=True)
class SoftGated:
    """SAPO, arXiv:2511.20347: L = -(4 / tau) sigmoid(tau (rho - 1)) A, a gate that closes softly in place of the clip.

    Its slope is 1 at rho = 1 and falls to both sides of it, faster for a larger tau. As in verl and TRL tau is
    `tau_negative` where A <= 0; nothing is clipped, and neither `clip_low` nor `clip_high` is read.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    """Larger than the other: the gradients of bad tokens spread over the whole vocabulary."""

    def __post_init__(self) -> None:
        check_ranges(self, "SoftGated.", tau_positive=TEMPERATURE, tau_negative=TEMPERATURE)

    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
        """The loss of each token."""
        positive = tokens.advantages > 0
        tau = torch.full_like(tokens.advantages, self.tau_negative).masked_fill(positive, self.tau_positive)  # [R]
        gate = torch.sigmoid(tau * (tokens.ratio - 1)) * 4 / tau
        never = torch.zeros_like(positive)
        return TokenLosses(-gate * tokens.advantages, never, never)


@dataclass(frozen=True)
class StaleClipped:
    """Another clip range for tokens that older weights drew (`rollout.max_staleness`, groups carried over).

    Coupled, their ratio is that of the policy to one of some rollouts ago, most of which a narrow range clips before
    the first update; fresh tokens keep `clip_low` and `clip_high`. (`Algorithm.decoupled` takes the other way: the
    range stays, and is laid around the policy before the updates.)
    """

    stale_low: float
    """The ratio of old tokens is clipped below 1 - stale_low."""
    stale_high: float
    """Likewise above 1 + stale_high."""
    surrogate: FunctionOrPath[Surrogate] = clipped

    def __post_init__(self) -> None:
        check_ranges(self, "StaleClipped.", stale_low=LIMIT_OR_ZERO, stale_high=LIMIT_OR_ZERO)
        arguments = ("tokens", "clip_low", "clip_high")
        function = resolve_function(self.surrogate, "model.algorithm.surrogate.init_args.surrogate", arguments)
        object.__setattr__(self, "surrogate", function)

    @property
    def needs(self) -> Needs:
        """Those of the surrogate, and old tokens."""
        return replace(getattr(self.surrogate, "needs", Needs()), rows="tokens", stale_tokens=True)

    def __call__(self, tokens: Tokens, clip_low: float, clip_high: float) -> TokenLosses:
        """The loss of each token; the surrogate gets a range for each, [R]."""
        if tokens.stale is None:
            return self.surrogate(tokens, clip_low, clip_high)
        low = torch.full_like(tokens.old_logp, clip_low).masked_fill(tokens.stale, self.stale_low)  # [R]
        high = torch.full_like(tokens.old_logp, clip_high).masked_fill(tokens.stale, self.stale_high)
        return self.surrogate(tokens, low, high)


# ---- estimates of KL(policy || reference) from one sampled token, by the names of Schulman's note ----
# http://joschu.net/blog/kl-approx.html, with x = log policy(token) - log reference(token) and the token drawn from the
# policy: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x. k1 and k3 are unbiased. As a term of the LOSS only the gradient
# counts, and that orders them differently; each function says what its gradient is.


@needs(kl_in_reward=True)
def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k1 = x = logp - ref_logp, [R]; unbiased, may be negative. For `kl_placement: reward`.

    In the loss it does nothing: the expectation of its gradient, that of logp, is zero.
    """
    return log_ratio(logp, ref_logp)


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k2 = x^2 / 2 with x = logp - ref_logp, [R]; biased, but the right one to differentiate.

    Its gradient, x * grad logp, is in expectation that of KL(policy || reference): what REINFORCE++-baseline takes
    (arXiv:2501.03262), and what verl and others put behind the value of k3 as "k3+".
    """
    return log_ratio(logp, ref_logp).square() / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 = exp(-x) - 1 + x with x = logp - ref_logp, [R]; unbiased and never negative (GRPO, arXiv:2402.03300, eq. 4).

    Its gradient, (1 - exp(-x)) * grad logp, is in expectation that of the other direction, KL(reference || policy).
    """
    difference = log_ratio(logp, ref_logp)
    return (-difference).exp() - 1 + difference


@dataclass(frozen=True)
class BoundedK3:
    """min(k3, limit), [R]: `low_var_kl` of verl, EasyR1 and Long-RL. Beyond the limit a token has no gradient."""

    limit: float = 10.0
    """10 is where the reference finds a token 14 times as likely, or 11 nats less likely."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"the limit of BoundedK3 must be above 0, got {self.limit}; verl has 10")

    def __call__(self, logp: Tensor, ref_logp: Tensor) -> Tensor:
        """The estimates of tokens [R]."""
        return k3(logp, ref_logp).clamp(max=self.limit)


@needs(importance_ratio=True)
def k3_unbiased(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3, which `Algorithm` multiplies by rho = policy / old policy: DeepSeek-V3.2, arXiv:2512.02556, eq. 7. [R].

    The old policy drew the tokens (if `decoupled`, rho times the correction is the ratio to the one that did), so the
    product is unbiased in later updates too; and as rho carries gradient, that of the product, rho * x * grad logp, is
    in expectation that of KL(policy || reference), also at rho = 1. TRL's `use_bias_correction_kl`. As part of the
    reward it is k3.
    """
    return k3(logp, ref_logp)


# ---- token weights: the loss is the SUM of weight * loss of a token, never a mean ----
# A rule is `(lengths [C], valid [C], all_reduce) -> [C]`, the weight of EACH token of a completion, for the C
# completions of one optimizer step on this rank. Over all tokens of all ranks the weights add up to 1 (for `Constant`:
# at most to 1), so no split into micro-batches or ranks changes the gradient. Completions that are not valid or have no
# token weigh 0 and are counted nowhere; where there are no others, all weights are 0.


def sequence_mean(lengths: Tensor, valid: Tensor, all_reduce: AllReduce = single_rank) -> Tensor:
    """1 / (number of completions * |y|): the mean over completions of the mean over tokens. GRPO, arXiv:2402.03300.

    A token of a short completion counts for more than one of a long completion.
    """
    counted = valid & (lengths > 0)
    num_completions = all_reduce(counted.double().sum())
    return torch.where(counted, 1 / (num_completions * lengths), 0.0).float()


def token_mean(lengths: Tensor, valid: Tensor, all_reduce: AllReduce = single_rank) -> Tensor:
    """1 / number of tokens of the optimizer step over all ranks: every token counts the same. DAPO, arXiv:2503.14476.

    Eq. 8 of the paper divides by the tokens of one prompt's group; its code, verl and this function by those of the
    whole batch. It is also the sum over tokens of REINFORCE, RLOO and ReMax, divided by the mean length.
    """
    counted = valid & (lengths > 0)
    num_tokens = all_reduce(lengths.double().where(counted, 0.0).sum())
    return torch.where(counted, 1 / num_tokens, 0.0).float()


@dataclass(frozen=True)
class Constant:
    """1 / (number of completions * max_completion_tokens): Dr.GRPO, arXiv:2503.20783, without length bias.

    Every token counts the same in every step; the weights add up to mean length / maximum. In YAML it is
    `class_path: longrl.algorithms.Constant` with `init_args: {max_completion_tokens: 1024}`.
    """

    max_completion_tokens: int
    """The sampling limit of the run."""

    def __post_init__(self) -> None:
        if self.max_completion_tokens < 1:
            raise ValueError(f"max_completion_tokens must be at least 1, got {self.max_completion_tokens}")

    @property
    def needs(self) -> Needs:
        """Completions of at most `max_completion_tokens`."""
        return Needs(max_completion_tokens=self.max_completion_tokens)

    def __call__(self, lengths: Tensor, valid: Tensor, all_reduce: AllReduce = single_rank) -> Tensor:
        """The weights [C]."""
        if lengths.numel() and int(lengths.max()) > self.max_completion_tokens:
            raise ValueError(
                f"a completion has {int(lengths.max())} tokens, above the {self.max_completion_tokens} that Constant "
                "divides by; set model.algorithm.token_weights.init_args.max_completion_tokens to "
                "max_completion_tokens of the sampling"
            )
        counted = valid & (lengths > 0)
        num_completions = all_reduce(counted.double().sum())
        return torch.where(counted, 1 / (num_completions * self.max_completion_tokens), 0.0).float()
