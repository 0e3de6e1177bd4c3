"""Checks of an algorithm against the run that it is to train, before weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from longrl.algorithms.advantages import InOrder
from longrl.algorithms.corrections import CorrectionProduct, no_correction
from longrl.algorithms.needs import Needs
from longrl.types import SamplingParams

if TYPE_CHECKING:
    from longrl.algorithms.algorithm import Algorithm

logger = logging.getLogger(__name__)

FUNCTIONS = {
    "advantage": ("outcomes",),
    "surrogate": ("tokens", "clip_low", "clip_high"),
    "token_weights": ("lengths", "valid", "all_reduce"),
    "select": ("groups",),
    "kl": ("logp", "ref_logp"),
    "correction": ("tokens", "cap"),
}
"""Fields with a function -> what it is called with."""


def check_decoupled(algorithm: Algorithm) -> None:
    """Raises ValueError if nothing would weigh the policy before the update against the one that sampled."""
    if not algorithm.decoupled:
        return
    names = []
    for field, name, need in function_needs(algorithm):
        if field != "correction":
            continue
        if name != no_correction.__name__ and not need.mask:
            return
        names.append(name)
    raise ValueError(
        "model.algorithm.decoupled=true leaves it to the correction to weigh the policy before the update against the "
        f"one that sampled, got {' and '.join(names)}; set model.algorithm.correction to "
        "longrl.algorithms.truncated_token, or decoupled to false"
    )


def check_tokens(
    algorithm: Algorithm, sampling: SamplingParams, mini_batches: int, max_staleness: int, resamples: bool
) -> None:
    """`Algorithm.validate`, of a policy that writes tokens."""
    if sampling.num_generations > 1 and sampling.temperature == 0:
        raise ValueError(
            f"at temperature 0 the {sampling.num_generations} completions of a prompt are the same, and nothing is "
            "learned; set rollout.sampling.temperature above 0"
        )
    uses_greedy = False
    for field, name, need in function_needs(algorithm):
        if need.rows == "denoising steps":
            raise ValueError(
                f"model.algorithm.{field}={name} is for denoising steps, and this policy writes tokens; set "
                "model.algorithm.kl to longrl.algorithms.k3 and model.algorithm.surrogate to "
                "longrl.algorithms.clipped"
            )
        if need.greedy_baseline and not algorithm.greedy_baseline:
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
        if need.kl_in_reward and algorithm.kl_coef > 0 and algorithm.kl_placement == "loss":
            logger.warning(
                "%s in the loss has no effect on average, for its gradient is that of the log-probability alone; "
                "set model.algorithm.kl to longrl.algorithms.k2 or k3, or model.algorithm.kl_placement to reward",
                name,
            )
    if algorithm.greedy_baseline and not uses_greedy:
        logger.warning(
            "model.algorithm.greedy_baseline samples greedy completions that nothing uses; "
            "set model.algorithm.advantage to longrl.algorithms.greedy_centered, or greedy_baseline to false"
        )
    instead = "use configs/algorithm/reinforce_pp.yaml or remax.yaml"
    _check_groups(algorithm, sampling.num_generations, instead)
    leaves_groups = resamples and any(need.full_distribution for _, _, need in function_needs(algorithm))
    _check_own_samples(algorithm, mini_batches, max_staleness, leaves_groups)
    _check_whole_completions(algorithm, max_staleness)
    for field, name, need in function_needs(algorithm):
        if need.reward_parts and algorithm.kl_coef > 0 and algorithm.kl_placement == "reward":
            raise ValueError(
                f"{name} looks at the parts of the reward, of which a KL penalty is none, got kl_placement=reward; set "
                "model.algorithm.kl_placement to loss, or kl_coef to 0"
            )
        if need.stale_tokens and not max_staleness and not leaves_groups:
            logger.warning(
                "the %s %s treats tokens of older weights apart, and there are none: set rollout.max_staleness above "
                "0, or model.algorithm.%s to longrl.algorithms.clipped",
                field, name, field,
            )  # fmt: skip
    if algorithm.decoupled and max_staleness and mini_batches == 1:
        logger.warning(
            "model.algorithm.decoupled with one update per rollout clips nothing, for the policy before the update "
            "is the one that is updated: the correction's cap alone bounds old tokens; set model.algorithm."
            "decoupled to false, or raise model.mini_batches_per_rollout"
        )


def check_steps(algorithm: Algorithm, num_generations: int, mini_batches: int) -> None:
    """`Algorithm.validate_steps`, of a policy that takes denoising steps."""
    for field, name, need in function_needs(algorithm):
        if field == "kl":
            misplaced = need.rows != "denoising steps" or algorithm.kl_placement != "loss"
            if algorithm.kl_coef > 0 and misplaced:
                raise ValueError(
                    f"the KL penalty of denoising steps is gaussian_mean in the loss, got {name} in the "
                    f"{algorithm.kl_placement}; set model.algorithm.kl to longrl.algorithms.gaussian_mean or "
                    "gaussian_mean_rate and kl_placement to loss, or kl_coef to 0"
                )
        elif need.rows == "tokens" or algorithm.greedy_baseline or algorithm.decoupled:
            raise ValueError(
                "denoising steps of a sample are scored apart, by the model that drew them, so ratios "
                "and baselines of whole completions, corrections, decoupled and greedy_baseline have no meaning, got "
                f"{name} as model.algorithm.{field}; set model.algorithm.surrogate to longrl.algorithms.clipped, "
                "correction to longrl.algorithms.no_correction, advantage to longrl.algorithms.group_normalized, "
                "decoupled and greedy_baseline to false"
            )
    if algorithm.entropy_coef or algorithm.entropy_control is not None:
        raise ValueError(
            "denoising steps are Gaussians of a given deviation, whose entropy no training changes; set "
            "model.algorithm.entropy_coef to 0 and entropy_control to null"
        )
    if algorithm.top_entropy_share < 1:
        raise ValueError(
            "denoising steps draw from Gaussians of a given deviation, whose entropies are equal, got "
            f"top_entropy_share={algorithm.top_entropy_share}; set model.algorithm.top_entropy_share to 1"
        )
    if algorithm.fp32_lm_head:
        raise ValueError("a diffusion model has no LM head; set model.algorithm.fp32_lm_head to false")
    _check_groups(algorithm, num_generations, "set model.algorithm.advantage to longrl.algorithms.raw")
    _check_own_samples(algorithm, mini_batches, max_staleness=0, leaves_groups=False)


def function_needs(algorithm: Algorithm) -> Iterator[tuple[str, str, Needs]]:
    """Field, name and needs of every function."""
    for field in FUNCTIONS:
        function = getattr(algorithm, field)
        several: list[Any] = [function]
        if isinstance(function, InOrder):
            several = function.steps
        if isinstance(function, CorrectionProduct):
            several = function.factors
        for one in several:
            name = getattr(one, "__name__", type(one).__name__)
            # Corrections compare a sampler's tokens with the trainer's, unless they say that they read anything.
            default = Needs(rows="tokens" if field == "correction" else "any")
            yield field, name, getattr(one, "needs", default)


def _check_groups(algorithm: Algorithm, num_generations: int, instead: str) -> None:
    for _, name, need in function_needs(algorithm):
        if need.groups and num_generations < 2:
            raise ValueError(
                f"{name} compares the completions of a prompt and needs num_generations >= 2, "
                f"got {num_generations}; raise rollout.sampling.num_generations, or {instead}"
            )


def _check_own_samples(algorithm: Algorithm, mini_batches: int, max_staleness: int, leaves_groups: bool) -> None:
    """Refuses functions without importance ratio where other weights than those of a step have sampled for it."""
    problems = []
    if mini_batches > 1:
        problems.append(
            f"{mini_batches} updates per rollout (model.mini_batches_per_rollout times model.epochs_per_rollout)"
        )
    if max_staleness:
        problems.append(f"rollout.max_staleness={max_staleness}")
    if leaves_groups:
        problems.append("a model.algorithm.select that leaves groups to the next step (rollout.max_resample_rounds)")
    for field, name, need in function_needs(algorithm):
        if need.one_update and problems:
            raise ValueError(
                f"the {field} {name} has no importance ratio, and with {' and '.join(problems)} it would take "
                "samples of other weights for its own; set model.algorithm.surrogate to "
                "longrl.algorithms.reinforce or clipped, or one update per rollout, rollout.max_staleness to 0 "
                "and rollout.max_resample_rounds to 0"
            )


def _check_whole_completions(algorithm: Algorithm, max_staleness: int) -> None:
    """Looks at ratios of whole completions, several weights of which may have drawn the tokens."""
    for field, name, need in function_needs(algorithm):
        if not need.over_completion or not max_staleness:
            continue
        if field == "correction" and algorithm.decoupled:
            if need.geometric:
                continue
            logger.warning(
                "%s multiplies the ratios of all tokens of a completion, and with rollout.max_staleness=%d there "
                "are updates in each: of a long completion little but 0 and the cap is left "
                "(train/correction_mean); set model.algorithm.correction to longrl.algorithms.truncated_token",
                name, max_staleness,
            )  # fmt: skip
        elif field == "correction" and max_staleness > 1:
            combines = "averages" if need.geometric else "multiplies"
            raise ValueError(
                f"{name} {combines} the ratios of all tokens of a completion, and with rollout.max_staleness="
                f"{max_staleness} those that older weights drew have none: they count in the surrogate's; set "
                "model.algorithm.correction to longrl.algorithms.truncated_token, or decoupled to true"
            )
        elif field == "surrogate" and not algorithm.decoupled and max_staleness > 1:
            logger.warning(
                "%s keeps or clips a completion as a whole, around policies of up to %d rollouts ago: most are "
                "outside of a narrow range before the first update (train/clip_fraction_high, "
                "clip_fraction_low); set model.algorithm.decoupled to true and correction to "
                "longrl.algorithms.truncated_token, or widen clip_low and clip_high",
                name, max_staleness,
            )  # fmt: skip


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
