"""The objective of a run: one function per question, and the constants they share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from longrl.algorithms import losses
from longrl.algorithms.advantages import InOrder, Outcomes, Selection, group_normalized, keep_all
from longrl.algorithms.control import EntropyControl, KLControl, MovingReference
from longrl.algorithms.losses import AllReduce, Tokens, single_rank
from longrl.algorithms.needs import NO_NEEDS, Needs
from longrl.io.functions import FunctionOrPath, resolve_function
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges
from longrl.types import SamplingParams

logger = logging.getLogger(__name__)

# Any stands for what the comment says: with a class there, jsonargparse would want a factory of that class, and refuse
# a class_path whose instances are called.
Advantage = Callable[[Outcomes], Any]  # -> Tensor [P, G] or [N]
Surrogate = Callable[[Tokens, float, float], Any]  # (tokens, clip_low, clip_high) -> TokenLosses
TokenWeights = Callable[[Tensor, Tensor, AllReduce], Any]  # (lengths [C], valid [C], all_reduce) -> Tensor [C]
Estimator = Callable[[Tensor, Tensor], Any]  # (logp [R], ref_logp [R]) -> Tensor [R]
Correction = Callable[[Tokens, float], Any]  # (tokens, cap) -> Tensor [R]

_NO_KL = (
    "model.algorithm.moving_reference moves what the KL penalty compares with, and kl_coef=0 has none; set "
    "model.algorithm.kl_coef above 0, or moving_reference to null"
)
FUNCTIONS = {
    "advantage": ("outcomes",),
    "surrogate": ("tokens", "clip_low", "clip_high"),
    "token_weights": ("lengths", "valid", "all_reduce"),
    "select": ("groups",),
    "kl": ("logp", "ref_logp"),
    "correction": ("tokens", "cap"),
}
"""Fields with a function -> what it is called with."""


@dataclass(frozen=True)
class LossOutput:
    """Loss of a micro-batch, and metrics; both are sums under the weights, and add up over micro-batches and ranks."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Algorithm:
    """An RL objective; the defaults are GRPO without KL. `configs/algorithm/` has one file per paper.

    L = sum over tokens of weight * (correction * surrogate(logp, old, advantage) + kl_coef * kl(logp, reference)
    - entropy_coef * entropy), where the second term is missing if the KL penalty is taken off the reward instead.

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
    """The worth of a completion: advantages.py."""
    surrogate: FunctionOrPath[Surrogate] = losses.clipped
    """The loss of a token: losses.py, as are the weights, KL estimators and corrections."""
    token_weights: FunctionOrPath[TokenWeights] = losses.sequence_mean
    """How much a token counts."""
    select: FunctionOrPath[Selection] = keep_all
    """Which groups train: advantages.py."""
    kl: FunctionOrPath[Estimator] = losses.k3
    """Estimator of the distance to the reference policy."""
    kl_coef: float = 0.0
    """0 needs no reference policy."""
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
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high."""
    correction: FunctionOrPath[Correction] = losses.no_correction
    """Importance weights between the engine that sampled and the trainer."""
    correction_cap: float = 2.0
    """Where importance weights are truncated or masked."""
    decoupled: bool = False
    """Of tokens that older weights drew: the ratio is clipped around the policy before the update, as that of all
    others, and `correction` weighs that policy against the one that drew them (AReaL, arXiv:2505.24298, sec. 5.2); in
    the first update that clips nothing. False clips around the policy that drew them, whose ratio is the importance
    weight, and corrects the others."""
    advantage_limit: float | None = None
    """Advantages are held within +- this (Flow-GRPO's code: 5); None leaves them."""
    greedy_baseline: bool = False
    """Sample one greedy completion more per prompt, whose reward is the baseline of `greedy_centered`."""
    fp32_lm_head: bool = False
    """Compute the LM head in float32 in trainer and engine alike, of weights of any precision (MiniMax-M1,
    arXiv:2506.13585, sec. 3.2): logits in bfloat16 make ratios of engine and trainer differ by percents."""

    def __post_init__(self) -> None:
        for name, arguments in FUNCTIONS.items():
            function = resolve_function(getattr(self, name), f"model.algorithm.{name}", arguments)
            object.__setattr__(self, name, function)
        check_ranges(self, "model.algorithm.", kl_coef=NOT_NEGATIVE, entropy_coef=NOT_NEGATIVE)
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
        if self.decoupled and self.correction is losses.no_correction:
            raise ValueError(
                "model.algorithm.decoupled=true leaves it to the correction to weigh the policy before the update "
                "against the one that sampled, got no_correction; set model.algorithm.correction to "
                "longrl.algorithms.truncated_token, or decoupled to false"
            )

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
        if sampling.num_generations > 1 and sampling.temperature == 0:
            raise ValueError(
                f"at temperature 0 the {sampling.num_generations} completions of a prompt are the same, and nothing is "
                "learned; set rollout.sampling.temperature above 0"
            )
        if self.moving_reference is not None and not self.kl_coef:
            raise ValueError(_NO_KL)
        uses_greedy = False
        for field, name, need in self._needs():
            if need.rows == "denoising steps":
                raise ValueError(
                    f"model.algorithm.{field}={name} is for denoising steps, and this policy writes tokens; set "
                    "model.algorithm.kl to longrl.algorithms.k3 and model.algorithm.surrogate to "
                    "longrl.algorithms.clipped"
                )
            if need.greedy_baseline and not self.greedy_baseline:
                raise ValueError(
                    f"{name} subtracts the reward of a greedy completion, got greedy_baseline=False; "
                    "set model.algorithm.greedy_baseline to true"
                )
            uses_greedy |= need.greedy_baseline
            if need.max_completion_tokens is not None:
                _check_limit(field, name, need.max_completion_tokens, sampling.max_completion_tokens)
            if need.full_distribution and (sampling.top_p < 1 or sampling.top_k > 0):
                logger.warning(
                    "with top_p or top_k the old log-probabilities of carried-over groups are those of the filtered "
                    "distribution, and their ratios a little low; set both off, or max_resample_rounds of the "
                    "RolloutCallback to 0"
                )
            if need.kl_in_reward and self.kl_coef > 0 and self.kl_placement == "loss":
                logger.warning(
                    "%s in the loss has no effect on average, for its gradient is that of the log-probability alone; "
                    "set model.algorithm.kl to longrl.algorithms.k2 or k3, or model.algorithm.kl_placement to reward",
                    name,
                )
        if self.greedy_baseline and not uses_greedy:
            logger.warning(
                "model.algorithm.greedy_baseline samples greedy completions that nothing uses; "
                "set model.algorithm.advantage to longrl.algorithms.greedy_centered, or greedy_baseline to false"
            )
        instead = "use configs/algorithm/reinforce_pp.yaml or remax.yaml"
        self._check_groups(sampling.num_generations, instead)
        leaves_groups = resamples and any(need.full_distribution for _, _, need in self._needs())
        self._check_own_samples(mini_batches, max_staleness, leaves_groups)
        self._check_whole_completions(max_staleness)
        if self.decoupled and max_staleness and mini_batches == 1:
            logger.warning(
                "model.algorithm.decoupled with one update per rollout clips nothing, for the policy before the update "
                "is the one that is updated: the correction's cap alone bounds old tokens; set model.algorithm."
                "decoupled to false, or raise model.mini_batches_per_rollout"
            )

    def validate_steps(self, num_generations: int, mini_batches: int) -> None:
        """Checks the algorithm against a run whose policy takes denoising steps; as `validate`."""
        for field, name, need in self._needs():
            if field == "kl":
                misplaced = need.rows != "denoising steps" or self.kl_placement != "loss"
                if self.kl_coef > 0 and misplaced:
                    raise ValueError(
                        f"the KL penalty of denoising steps is gaussian_mean in the loss, got {name} in the "
                        f"{self.kl_placement}; set model.algorithm.kl to longrl.algorithms.gaussian_mean or "
                        "gaussian_mean_rate and kl_placement to loss, or kl_coef to 0"
                    )
            elif need.rows == "tokens" or self.greedy_baseline or self.decoupled:
                raise ValueError(
                    "denoising steps of a sample are scored apart, by the model that drew them, so sequence_clipped, "
                    "corrections, decoupled and greedy_baseline have no meaning; set model.algorithm.surrogate to "
                    "longrl.algorithms.clipped, correction to longrl.algorithms.no_correction, decoupled and "
                    "greedy_baseline to false"
                )
        if self.entropy_coef or self.entropy_control is not None:
            raise ValueError(
                "denoising steps are Gaussians of a given deviation, whose entropy no training changes; set "
                "model.algorithm.entropy_coef to 0 and entropy_control to null"
            )
        if self.moving_reference is not None and not self.kl_coef:
            raise ValueError(_NO_KL)
        if self.fp32_lm_head:
            raise ValueError("a diffusion model has no LM head; set model.algorithm.fp32_lm_head to false")
        self._check_groups(num_generations, "set model.algorithm.advantage to longrl.algorithms.raw")
        self._check_own_samples(mini_batches, max_staleness=0, leaves_groups=False)

    @property
    def task_decay(self) -> float | None:
        """Of the averages of tasks' rewards that the advantage reads; None if it reads none."""
        needs = getattr(self.advantage, "needs", NO_NEEDS)
        return needs.task_decay

    def _needs(self) -> Iterator[tuple[str, str, Needs]]:
        """Field, name and needs of every function."""
        for field in FUNCTIONS:
            function = getattr(self, field)
            for one in function.steps if isinstance(function, InOrder) else [function]:
                name = getattr(one, "__name__", type(one).__name__)
                # Corrections compare a sampler's tokens with the trainer's, unless they say that they read anything.
                default = Needs(rows="tokens" if field == "correction" else "any")
                yield field, name, getattr(one, "needs", default)

    def _check_groups(self, num_generations: int, instead: str) -> None:
        for _, name, need in self._needs():
            if need.groups and num_generations < 2:
                raise ValueError(
                    f"{name} compares the completions of a prompt and needs num_generations >= 2, "
                    f"got {num_generations}; raise rollout.sampling.num_generations, or {instead}"
                )

    def _check_own_samples(self, mini_batches: int, max_staleness: int, leaves_groups: bool) -> None:
        """Refuses functions without importance ratio where other weights than those of a step have sampled for it."""
        problems = []
        if mini_batches > 1:
            problems.append(
                f"{mini_batches} updates per rollout (model.mini_batches_per_rollout times model.epochs_per_rollout)"
            )
        if max_staleness:
            problems.append(f"rollout.max_staleness={max_staleness}")
        if leaves_groups:
            problems.append(
                "a model.algorithm.select that leaves groups to the next step (rollout.max_resample_rounds)"
            )
        for field, name, need in self._needs():
            if need.one_update and problems:
                raise ValueError(
                    f"the {field} {name} has no importance ratio, and with {' and '.join(problems)} it would take "
                    "samples of other weights for its own; set model.algorithm.surrogate to "
                    "longrl.algorithms.reinforce or clipped, or one update per rollout, rollout.max_staleness to 0 "
                    "and rollout.max_resample_rounds to 0"
                )

    def _check_whole_completions(self, max_staleness: int) -> None:
        """Looks at ratios of whole completions, several weights of which may have drawn the tokens."""
        for field, name, need in self._needs():
            if not need.over_completion or not max_staleness:
                continue
            if field == "correction" and self.decoupled:
                logger.warning(
                    "%s multiplies the ratios of all tokens of a completion, and with rollout.max_staleness=%d there "
                    "are updates in each: of a long completion little but 0 and the cap is left "
                    "(train/correction_mean); set model.algorithm.correction to longrl.algorithms.truncated_token",
                    name, max_staleness,
                )  # fmt: skip
            elif field == "correction" and max_staleness > 1:
                raise ValueError(
                    f"{name} multiplies the ratios of all tokens of a completion, and with rollout.max_staleness="
                    f"{max_staleness} those that older weights drew have none: they count in the surrogate's; set "
                    "model.algorithm.correction to longrl.algorithms.truncated_token, or decoupled to true"
                )
            elif field == "surrogate" and not self.decoupled and max_staleness > 1:
                logger.warning(
                    "%s keeps or clips a completion as a whole, around policies of up to %d rollouts ago: most are "
                    "outside of a narrow range before the first update (train/clip_fraction_high, "
                    "clip_fraction_low); set model.algorithm.decoupled to true and correction to "
                    "longrl.algorithms.truncated_token, or widen clip_low and clip_high",
                    name, max_staleness,
                )  # fmt: skip

    def token_advantages(
        self,
        rewards: Tensor,
        valid: Tensor,
        lengths: Tensor,
        kl: Tensor | None = None,
        baseline: Tensor | None = None,
        all_reduce: AllReduce = single_rank,
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
        outcomes = Outcomes(rewards, valid, lengths, penalty, baseline, all_reduce, task_deviations)
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

        Returns:
            The loss, and as metrics the weighted sums of: `clip_fraction_low`, `clip_fraction_high`, `ratio_mean`,
            `approx_kl` (k3 of old against new policy), `correction_mean`; with a reference `kl_ref`, with a sampler
            `sampler_kl` (k3 of sampler against old policy); and `weight_sum`, 1 over a step but for `Constant`.
        """
        # 1. What the KL estimator compares: log-probabilities, or means in units of the noise.
        tokens = Tokens(logp, old_logp.detach(), advantages.detach(), completion_index, sampler_logp, steps)
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


def _check_limit(field: str, name: str, divisor: int, sampled: int) -> None:
    """Compares the tokens that weights divide by with the run's limit of a completion."""
    option = f"model.algorithm.{field}.init_args.max_completion_tokens"
    if divisor < sampled:
        raise ValueError(
            f"{name} divides by {divisor} tokens, but completions may have {sampled}; set {option} to "
            "max_completion_tokens of the sampling"
        )
    if divisor > sampled:
        logger.warning(
            "%s divides by %d tokens, but completions have at most %d: the loss is %.1f times smaller than meant; set "
            "%s to %d",
            name, divisor, sampled, divisor / sampled, option, sampled,
        )  # fmt: skip
