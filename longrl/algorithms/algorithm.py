"""The objective of a run: one function per question, and the constants they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from longrl.algorithms import corrections, losses
from longrl.algorithms.advantages import Outcomes, Selection, group_normalized, keep_all
from longrl.algorithms.checks import FUNCTIONS, check_decoupled, check_steps, check_tokens
from longrl.algorithms.control import EntropyControl, KLControl, MovingReference
from longrl.algorithms.corrections import Correction
from longrl.algorithms.losses import AllReduce, Surrogate, Tokens, single_rank
from longrl.algorithms.needs import NO_NEEDS
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.number_ranges import LEAST, NOT_NEGATIVE, check_ranges
from longrl.types import SamplingParams

# Any stands for what the comment says: with a class there, jsonargparse would want a factory of that class, and refuse
# a class_path whose instances are called.
Advantage = Callable[[Outcomes], Any]  # -> Tensor [P, G] or [N]
TokenWeights = Callable[[Tensor, Tensor, AllReduce], Any]  # (lengths [C], valid [C], all_reduce) -> Tensor [C]
Estimator = Callable[[Tensor, Tensor], Any]  # (logp [R], ref_logp [R]) -> Tensor [R]


@dataclass(frozen=True)
class LossOutput:
    """Loss of a micro-batch, and metrics; both are sums under the weights, and add up over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Algorithm:
    """An RL objective; the defaults are GRPO without KL. `configs/algorithm/` has one file per paper.

        L = sum over tokens of weight * (correction * surrogate(logp, old, advantage)
                                         + kl_coef * kl(logp, reference) - entropy_coef * entropy)

    The second term is missing if the KL penalty is taken off the reward instead.

    In YAML a function is its import path or `file.py:function`, and one with settings a `class_path` with `init_args`.
    What a function needs of the run it says itself (longrl/algorithms/needs.py).

    Example:
        ```python
        algorithm = Algorithm(token_weights=token_mean, select=drop_uniform, clip_high=0.28)          # DAPO
        groups = algorithm.select(groups)
        advantages = algorithm.token_advantages(rewards, valid, lengths)                              # [N]
        weights = algorithm.token_weights(lengths, valid, single_rank)                                # [C], per step
        output = algorithm.loss(logp, old_logp, None, None, advantages[rows], weights[completion_index],
                                completion_index)
        output.loss.backward()
        ```
    """

    advantage: FunctionOrPath[Advantage] = group_normalized
    """What a completion is worth beside the others of its group; docs/algorithms.md lists the functions."""
    surrogate: FunctionOrPath[Surrogate] = losses.clipped
    """The loss of a token from its log-probabilities and its advantage: the clipped one is PPO's and GRPO's."""
    token_weights: FunctionOrPath[TokenWeights] = losses.sequence_mean
    """How much each token counts in the loss: a mean over each completion, or over all tokens of the step (DAPO)."""
    select: FunctionOrPath[Selection] = keep_all
    """Which groups train: all, or only those whose rewards differ (`longrl.algorithms.drop_uniform`, DAPO's dynamic
    sampling)."""
    kl: FunctionOrPath[Estimator] = losses.k3
    """Estimator of the distance to the reference policy."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to the policy that the run began with; 0 has none and loads no reference weights."""
    kl_placement: Literal["loss", "reward"] = "loss"
    """`loss`: a term with its own gradient. `reward`: taken off the rewards before the advantage, at the old policy."""
    kl_control: KLControl | None = None
    """Moves the KL coefficient after each rollout, from `kl_coef` on; None leaves it."""
    moving_reference: MovingReference | None = None
    """Has the reference follow the policy; None leaves it where the run began."""
    entropy_coef: float = 0.0
    """Of the entropy bonus, whose gradient is that of the whole distribution of each token; 0 is none. verl's
    `entropy_coeff`: entropies are weighed as the losses are."""
    entropy_control: EntropyControl | None = None
    """Moves the entropy coefficient after each rollout, from `entropy_coef` on; None leaves it."""
    clip_low: float = 0.2
    """The ratio of new to old probability is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high; a larger one than clip_low (0.28 in DAPO) keeps entropy up."""
    correction: FunctionOrPath[Correction] = corrections.no_correction
    """Importance weights between the engine that sampled and the trainer: corrections.py."""
    correction_cap: float = 2.0
    """Where importance weights are truncated or masked; corrections with bounds of their own do not read it."""
    decoupled: bool = False
    """Of tokens that older weights drew: the ratio is clipped around the policy before the update, as that of all
    others, and `correction` weighs that policy against the one that drew them (AReaL, arXiv:2505.24298, sec. 5.2); in
    the first update that clips nothing. False clips around the policy that drew them, whose ratio is the importance
    weight, and corrects the others."""
    advantage_limit: float | None = None
    """Advantages are held within +- this (Flow-GRPO's code: 5); None leaves them."""
    top_entropy_share: float = 1.0
    """Of the tokens of an optimizer step, the share of highest entropy that gets the policy gradient, arXiv:2506.01939
    (0.2); a KL term keeps all of them. Below 1 the entropies are those of the policy before the updates, for which it
    scores the tokens once, if it does not anyway."""
    greedy_baseline: bool = False
    """Sample one greedy completion more per prompt, whose reward is the baseline of `greedy_centered`."""
    fp32_lm_head: bool = False
    """Compute the LM head in float32 in trainer and engine alike, of weights of any precision (MiniMax-M1,
    arXiv:2506.13585, sec. 3.2): logits in bfloat16 make ratios of engine and trainer differ by percents."""

    def __post_init__(self) -> None:
        for name, arguments in FUNCTIONS.items():
            function = resolve_function(getattr(self, name), f"model.algorithm.{name}", arguments)
            object.__setattr__(self, name, function)
        check_ranges(
            self, "model.algorithm.", kl_coef=NOT_NEGATIVE, entropy_coef=NOT_NEGATIVE, top_entropy_share=(LEAST, 1)
        )
        if self.kl_control is not None and not self.kl_coef:
            raise ValueError(
                "model.algorithm.kl_control multiplies the coefficient that it begins with, and got kl_coef=0; set "
                "model.algorithm.kl_coef above 0, or kl_control to null"
            )
        for name in ("clip_low", "clip_high", "correction_cap"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"model.algorithm.{name} must be a number >= 0, got {getattr(self, name)}")
        if self.advantage_limit is not None and not self.advantage_limit > 0:
            raise ValueError(
                f"model.algorithm.advantage_limit must be above 0, or null for none, got {self.advantage_limit}"
            )
        check_decoupled(self)

    def validate(
        self, sampling: SamplingParams, mini_batches: int, max_staleness: int = 0, resamples: bool = True
    ) -> None:
        """Checks the algorithm against a run whose policy writes tokens, before weights are loaded.

        Args:
            sampling: of the training rollouts.
            mini_batches: optimizer steps per rollout.
            max_staleness: rollouts that the weights which draw a token may be older than those that it trains.
            resamples: further prompts are drawn while groups are missing, and the surplus is left to the next step.

        Raises:
            ValueError: it could not learn; the message has rule, value and remedy.
        """
        check_tokens(self, sampling, mini_batches, max_staleness, resamples)

    def validate_steps(self, num_generations: int, mini_batches: int) -> None:
        """Checks the algorithm against a run whose policy takes denoising steps; as `validate`."""
        check_steps(self, num_generations, mini_batches)

    @property
    def task_decay(self) -> float | None:
        """Of the averages of tasks' rewards that the advantage reads; None if it reads none."""
        needs = getattr(self.advantage, "needs", NO_NEEDS)
        return needs.task_decay

    def token_advantages(
        self,
        rewards: Tensor,
        valid: Tensor,
        lengths: Tensor,
        kl: Tensor | None = None,
        baseline: Tensor | None = None,
        all_reduce: AllReduce = single_rank,
        parts: Mapping[str, Tensor] | None = None,
        part_weights: Mapping[str, Tensor] | None = None,
        gradient_norms: Tensor | None = None,
        task_deviations: Tensor | None = None,
    ) -> Tensor:
        """The advantage of every token of a rollout.

        With `kl_placement: reward` every token costs kl_coef * kl. `batch_normalized` takes that as a reward per token
        (return from t on); all other advantages take the scalar r - kl_coef * (sum of kl over the completion).

        Args:
            rewards: [P, G].
            valid: [P, G] bool; a completion that is not valid gets 0 and enters no statistic.
            lengths: [P * G] tokens of each completion.
            kl: [N] estimates at the old policy; needed with `kl_placement: reward`, else None.
            baseline: [P] rewards of greedy completions.
            all_reduce: sums over data-parallel ranks.
            parts: as `Outcomes` has them, as are `part_weights` and `gradient_norms`.
            part_weights: of the parts.
            gradient_norms: [N], where the advantage reads them.
            task_deviations: [P] of the rewards of each group's task, where the advantage asks for a `task_decay`.

        Returns:
            [N], completion after completion, in the dtype of the rewards.
        """
        if (kl is not None) != (self.kl_placement == "reward" and self.kl_coef > 0):
            raise ValueError(
                f"kl_placement={self.kl_placement!r} with kl_coef={self.kl_coef} "
                f"{'takes no' if kl is not None else 'needs the'} KL estimates of the rollout's tokens; "
                "set model.algorithm.kl_placement and model.algorithm.kl_coef to what is meant"
            )
        penalty = None if kl is None else self.kl_coef * kl
        outcomes = Outcomes(
            rewards,
            valid,
            lengths,
            kl_penalty=penalty,
            baseline=baseline,
            parts=parts or {},
            part_weights=part_weights or {},
            gradient_norms=gradient_norms,
            task_deviations=task_deviations,
            all_reduce=all_reduce,
        )
        advantages: Tensor = self.advantage(outcomes)
        if self.advantage_limit is not None:
            advantages = advantages.clamp(-self.advantage_limit, self.advantage_limit)
        if advantages.dim() == 2:  # one of each completion
            advantages = advantages.flatten().repeat_interleave(lengths)
        valid_tokens = valid.flatten().repeat_interleave(lengths)  # [N]
        return advantages.where(valid_tokens, 0.0).to(rewards.dtype)

    def loss(
        self,
        logp: Tensor,
        old_logp: Tensor,
        ref_logp: Tensor | None,
        sampler_logp: Tensor | None,
        advantages: Tensor,
        weights: Tensor,
        completion_index: Tensor,
        steps: losses.DrawnSteps | None = None,
        stale: Tensor | None = None,
    ) -> LossOutput:
        """The weighted sum over the tokens of a micro-batch; the gradient flows through `logp` alone.

        Args:
            logp: [R] under the policy being updated, with gradient.
            old_logp: [R] before the updates on this rollout, `logp.detach()` on the first; of tokens that older
                weights drew the sampler's, unless `decoupled`.
            ref_logp: [R] under the reference policy, or None without KL term.
            sampler_logp: [R] as the rollout engine reported them, or None.
            advantages: [R].
            weights: [R] of the token's completion, as `token_weights` gives them.
            completion_index: [R] which completion a row belongs to; none is split over micro-batches.
            steps: of rows that are denoising steps, whose KL term compares the means of policy and reference.
            stale: [R] bool, which tokens older weights drew; None is none.

        Returns:
            The loss, and as metrics the weighted sums of: `clip_fraction_low`, `clip_fraction_high`, `ratio_mean`,
            `approx_kl` (k3 of old against new policy), `correction_mean`; with a reference `kl_ref`, with a sampler
            `sampler_kl` (k3 of sampler against old policy); and `weight_sum`, 1 over a step but for `Constant`.
        """
        # 1. What the KL estimator compares: log-probabilities, or means in units of the noise.
        tokens = Tokens(logp, old_logp.detach(), advantages.detach(), completion_index, sampler_logp, steps, stale)
        current = logp
        reference = ref_logp
        if steps is not None:
            needs_rate = getattr(self.kl, "needs", NO_NEEDS).noise_rate
            unit = (steps.std / steps.length.sqrt() if needs_rate else steps.std)[:, None]  # [R, 1]
            current = steps.mean / unit
            reference = None if steps.ref_mean is None else steps.ref_mean / unit

        # 2. Each row's loss.
        weights = weights.detach()
        surrogate: losses.TokenLosses = self.surrogate(tokens, self.clip_low, self.clip_high)
        if not isinstance(surrogate, losses.TokenLosses):
            raise ValueError(
                "the function of model.algorithm.surrogate must return longrl.algorithms.TokenLosses(loss, "
                f"clipped_low, clipped_high), got a {type(surrogate).__name__}"
            )
        correction = self.correction(tokens, self.correction_cap).detach()
        row_losses = correction * surrogate.loss  # [R]
        metrics = {
            "clip_fraction_low": surrogate.clipped_low,
            "clip_fraction_high": surrogate.clipped_high,
            "ratio_mean": tokens.ratio,
            "approx_kl": losses.k3(tokens.old_logp, tokens.logp),
            "correction_mean": correction,
            "weight_sum": weights.new_ones(()),
        }
        if sampler_logp is not None:
            metrics["sampler_kl"] = losses.k3(sampler_logp, tokens.old_logp).where(sampler_logp.isfinite(), 0.0)
        if reference is not None:
            metrics["kl_ref"] = self.kl(current, reference.detach())
            if getattr(self.kl, "needs", NO_NEEDS).importance_ratio:
                # Decoupled, the old policy has not drawn the tokens: the product is the ratio to the one that has.
                drawn = tokens.ratio * correction if self.decoupled else tokens.ratio
                metrics["kl_ref"] = drawn * metrics["kl_ref"]
            if self.kl_placement == "loss":
                row_losses = row_losses + self.kl_coef * metrics["kl_ref"]
        elif self.kl_placement == "loss" and self.kl_coef > 0:
            raise ValueError(
                f"kl_coef={self.kl_coef} in the loss needs the reference's log-probabilities, got none; "
                "set model.algorithm.kl_coef to 0 to train without"
            )

        # 3. Sums over the rows.
        sums = {name: (weights * values.detach()).sum() for name, values in metrics.items()}
        return LossOutput((weights * row_losses).sum(), sums)
