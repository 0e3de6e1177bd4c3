"""Objectives on finished samples, in place of Flow-GRPO's on denoising steps: what is learned from rewards by noising.

They need no densities, so samples are drawn by the ODE (`rollout.sampling.window: null`), and they train the velocity
that flow matching trains: v at x = (1 - s) sample + s noise, whose target is noise - sample.

Letters: U rows of a micro-batch, R = U * samples of an item, D values of a latent; the dots stand for its axes.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from typing_extensions import override

from longrl.algorithms import Algorithm, function_needs
from longrl.diffusion.noised_rows import Item, Items, NoisedBatch
from longrl.diffusion.old_policy import OldPolicySettings
from longrl.diffusion.sampler import DiffusionSampling, Trajectory
from longrl.diffusion.trajectory_rows import TrajectoryGroup
from longrl.io.number_ranges import COUNT, LEAST, MOST, NOT_NEGATIVE, Range, check_ranges
from longrl.modules.mini_batches import MiniBatch
from longrl.strategies.axis import Axis
from longrl.types import TextPrompt

ABOVE_0: Range = (LEAST, MOST)
WITHOUT_EFFECT = (
    "kl_coef", "entropy_coef", "entropy_control", "surrogate", "correction", "decoupled", "greedy_baseline",
    "top_entropy_share", "fp32_lm_head",
)  # fmt: skip
"""Options of the algorithm that must be left at their defaults."""
LEAST_ERROR = 1e-5
"""Of adaptive weights, as released: an error below it counts as it."""


@dataclass(frozen=True)
class RowLosses:
    """Losses of the rows of a micro-batch, with gradient, and what is logged of them."""

    loss: Tensor
    """[U]"""
    metrics: dict[str, Tensor]
    """name -> [U], without gradient."""


@dataclass(frozen=True)
class Velocities:
    """Velocities of a micro-batch, [R, ...] float32 each."""

    policy: Tensor
    """With gradient."""
    old: Tensor | None
    """By the old policy, if there is one."""
    reference: Tensor | None
    """By the policy that the run began with, if that is asked for."""


@dataclass(frozen=True)
class Objective(abc.ABC):
    """Base of the objectives of this file."""

    num_times: int = 10
    """S: samples are noised to the sigmas of a schedule of so many steps, that of sampling for one."""
    times_per_sample: int = 9
    """K of them for each sample and optimizer step, drawn without repeats."""
    samples_per_row: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_ranges(self, "model.objective.", num_times=COUNT, times_per_sample=COUNT)
        if self.times_per_sample > self.num_times:
            raise ValueError(
                f"model.objective.times_per_sample must be at most num_times, {self.num_times}, for none is drawn "
                f"twice, got {self.times_per_sample}"
            )

    @property
    def old_policy(self) -> OldPolicySettings | None:
        """How the policy that samples follows the one that trains; None is the same policy."""
        return None

    @property
    @abc.abstractmethod
    def needs_reference(self) -> bool:
        """True if it compares with the policy that the run began with."""

    @abc.abstractmethod
    def items(self, mini_batch: MiniBatch[TextPrompt, Trajectory], algorithm: Algorithm, dp: Axis) -> Items:
        """What is trained of a mini-batch, each of whose samples counts as one token; every rank must call it."""

    @abc.abstractmethod
    def losses(self, velocities: Velocities, batch: NoisedBatch, scores: Tensor) -> RowLosses:
        """The loss of each row, given the [U] scores of their items."""

    def validate(self, algorithm: Algorithm, sampling: DiffusionSampling) -> None:
        """Refuses what has no meaning beside it, before weights are loaded.

        Raises:
            ValueError: with rule, value and remedy.
        """
        name = type(self).__name__
        if sampling.window is not None:
            raise ValueError(
                f"{name} trains on finished samples and no denoising step, but rollout.sampling.window names steps "
                "that draw noise; set rollout.sampling.window to null"
            )
        if sampling.num_generations < 2:
            raise ValueError(
                f"{name} compares the samples of a prompt and needs rollout.sampling.num_generations >= 2, got "
                f"{sampling.num_generations}"
            )
        for field_name, function, need in function_needs(algorithm):
            if field_name == "advantage" and (need.rows == "tokens" or need.greedy_baseline):
                raise ValueError(
                    f"{name} knows the reward of each sample, and {function} reads tokens or greedy completions beside "
                    "it; set model.algorithm.advantage to longrl.algorithms.group_normalized"
                )
        defaults = Algorithm()
        for option in WITHOUT_EFFECT:
            value = getattr(algorithm, option)
            without = getattr(defaults, option)
            if value != without:
                instead = ", and model.objective.init_args.kl_coef to what is meant" if option == "kl_coef" else ""
                raise ValueError(
                    f"{name} takes advantage, select and token_weights of the algorithm alone, and "
                    f"model.algorithm.{option}={name_of(value)} would have no effect; set it to {name_of(without)}"
                    f"{instead}"
                )


@dataclass(frozen=True)
class DiffusionNFT(Objective):
    """Negative-aware finetuning on the forward process, arXiv:2509.16117.

    The advantage A of a sample says how far it is worth imitating, r = clip(A / limit, -1, 1) / 2 + 1/2, and two
    velocities, one of which the other implies, are drawn to it:

        v+ = (1 - beta) v_old + beta v,    v- = (1 + beta) v_old - beta v
        L = r E+ + (1 - r) E-,    E+- = mean over D of (v+- - (noise - sample))^2                            (eq. 5)

    As released (`weighting: adaptive`) an error is that of the sample it predicts, s times that of the velocity, over
    its own mean absolute value m, held constant and at least 1e-5, and the loss is scaled by limit / beta:

        L = (limit / beta) (r E+ + (1 - r) E-) + kl_coef mean (v - v_ref)^2,    E+- = mean over D of e^2 / m

    Samples are drawn by the old policy, which follows the weights after every rollout.

    Example:
        `DiffusionNFT(beta=0.1, old=OldPolicySettings(flat_steps=75, decay_per_step=0.0075, max_decay=0.999))`
    """

    beta: float = 1.0
    """How far v+ and v- are from the old policy; the released recipes have 1, with OCR 0.1."""
    advantage_limit: float = 5.0
    """Advantages of this and beyond are 1 and 0 as r."""
    weighting: Literal["adaptive", "none"] = "adaptive"
    """`none` is eq. 5 without scale."""
    kl_coef: float = 1e-4
    """Of the squared distance to the velocities of the policy that the run began with; 0 needs none."""
    old: OldPolicySettings = field(default_factory=OldPolicySettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "model.objective.", beta=ABOVE_0, advantage_limit=ABOVE_0, kl_coef=NOT_NEGATIVE)

    @property
    @override
    def old_policy(self) -> OldPolicySettings:
        return self.old

    @property
    @override
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @override
    def items(self, mini_batch: MiniBatch[TextPrompt, Trajectory], algorithm: Algorithm, dp: Axis) -> Items:
        items = [
            Item((sample,), group.prompt.row.problem) for group in mini_batch.groups for sample in group.completions
        ]
        return Items(items, mini_batch.weights, mini_batch.advantages)

    @override
    def losses(self, velocities: Velocities, batch: NoisedBatch, scores: Tensor) -> RowLosses:
        # 1. The two velocities, both of which the gradient flows through.
        velocity = velocities.policy  # [R, ...]
        old = velocities.old
        assert old is not None
        positive = (1 - self.beta) * old + self.beta * velocity
        negative = (1 + self.beta) * old - self.beta * velocity

        # 2. How far each is from the sample.
        optimality = (scores / self.advantage_limit).clamp(-1, 1) / 2 + 0.5  # [U]
        positive_loss = self._error(positive, batch)  # [U]
        negative_loss = self._error(negative, batch)
        scale = self.advantage_limit / self.beta if self.weighting == "adaptive" else 1.0
        loss = scale * (optimality * positive_loss + (1 - optimality) * negative_loss)
        metrics = {
            "nft_optimality": optimality,
            "nft_positive": positive_loss,
            "nft_negative": negative_loss,
            "nft_old_distance": mean_square(velocity - old),
        }

        # 3. The reference.
        if velocities.reference is not None:
            metrics["kl_ref"] = mean_square(velocity - velocities.reference)
            loss = loss + self.kl_coef * metrics["kl_ref"]
        return RowLosses(loss, metrics)

    def _error(self, velocity: Tensor, batch: NoisedBatch) -> Tensor:
        error = velocity - batch.target  # [R, ...]
        if self.weighting == "none":
            return mean_square(error)
        error = batch.sigmas * error
        size = error.detach().abs().double().flatten(1).mean(1).clamp(min=LEAST_ERROR)  # [R]
        return mean_square(error) / size.to(error.dtype)


@dataclass(frozen=True)
class DiffusionDPO(Objective):
    """Direct preference optimization of velocities, arXiv:2311.12908, eq. 14, in the form for flow matching.

    A pair is the best and the worst sample of a prompt by reward, at one sigma with the same noise:

        L = -log sigmoid(-beta / 2 ((E(best) - E_ref(best)) - (E(worst) - E_ref(worst)))) + imitation E(best)

    with E = mean over D of (v - (noise - sample))^2, and E_ref that of the policy that the run began with. The paper's
    beta of 2000 (SD 1.5) and 5000 (SDXL) is of such means. Prompts whose samples have all the same reward make no pair.
    """

    beta: float = 2000.0
    """How closely the policy stays at the one that the run began with: larger is closer."""
    imitation: float = 0.0
    """Of flow matching on the best samples beside it; 0 is the paper's."""
    samples_per_row: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "model.objective.", beta=ABOVE_0, imitation=NOT_NEGATIVE)

    @property
    @override
    def needs_reference(self) -> bool:
        return True

    @override
    def items(self, mini_batch: MiniBatch[TextPrompt, Trajectory], algorithm: Algorithm, dp: Axis) -> Items:
        items = []
        for group in mini_batch.groups:
            order = ranked(group)
            if order and float(group.rewards[order[0]]) > float(group.rewards[order[-1]]):
                pair = (group.completions[order[0]], group.completions[order[-1]])
                items.append(Item(pair, group.prompt.row.problem))
        return evenly_weighted(items, mini_batch, algorithm, dp)

    @override
    def losses(self, velocities: Velocities, batch: NoisedBatch, scores: Tensor) -> RowLosses:
        assert velocities.reference is not None
        errors = mean_square(velocities.policy - batch.target).view(-1, 2)  # [U, 2], best and worst
        known = mean_square(velocities.reference - batch.target).view(-1, 2)
        best, worst = (errors - known).unbind(1)  # [U]
        margin = -self.beta / 2 * (best - worst)
        loss = -logsigmoid(margin) + self.imitation * errors[:, 0]
        metrics = {
            "pair_accuracy": (margin > 0).to(margin.dtype),
            "pair_margin": margin,
            "pair_best": best,
            "pair_worst": worst,
        }
        return RowLosses(loss, metrics)


@dataclass(frozen=True)
class BestOfGroup(Objective):
    """Flow matching on the best samples of each prompt by reward (rejection-sampling finetuning, RFT).

        L = mean over D of (v - (noise - sample))^2 + kl_coef mean (v - v_ref)^2

    A sample whose reward is not above the mean of its prompt's is never imitated.
    """

    keep: int = 1
    """So many samples of a prompt at most."""
    kl_coef: float = 0.0
    """Of the squared distance to the velocities of the policy that the run began with; 0 needs none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "model.objective.", keep=COUNT, kl_coef=NOT_NEGATIVE)

    @property
    @override
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @override
    def items(self, mini_batch: MiniBatch[TextPrompt, Trajectory], algorithm: Algorithm, dp: Axis) -> Items:
        items = []
        for group in mini_batch.groups:
            order = ranked(group)
            rewards = group.rewards.double()
            mean = rewards[order].mean() if order else 0.0
            best = [index for index in order[: self.keep] if rewards[index] > mean]
            items += [Item((group.completions[index],), group.prompt.row.problem) for index in best]
        return evenly_weighted(items, mini_batch, algorithm, dp)

    @override
    def losses(self, velocities: Velocities, batch: NoisedBatch, scores: Tensor) -> RowLosses:
        error = mean_square(velocities.policy - batch.target)  # [U]
        if velocities.reference is None:
            return RowLosses(error, {"flow_error": error})
        distance = mean_square(velocities.policy - velocities.reference)
        return RowLosses(error + self.kl_coef * distance, {"flow_error": error, "kl_ref": distance})


def ranked(group: TrajectoryGroup) -> list[int]:
    """Indices of a group's samples in the loss, the best reward first, of equal ones the earlier."""
    counted = group.valid if group.in_loss is None else group.in_loss
    indices = counted.nonzero().flatten().tolist()
    return sorted(indices, key=lambda index: -float(group.rewards[index]))


def evenly_weighted(
    items: Sequence[Item], mini_batch: MiniBatch[TextPrompt, Trajectory], algorithm: Algorithm, dp: Axis
) -> Items:
    """Items that count alike over all ranks; every rank must call it."""
    device = mini_batch.weights.device
    ones = torch.ones(len(items), dtype=torch.int64, device=device)
    weights = algorithm.token_weights(ones, ones.bool(), dp.sum)  # [M]
    return Items(items, weights, weights.new_zeros(len(items)))


def name_of(value: object) -> str:
    """An option's value as it is said: a function by its name."""
    return getattr(value, "__name__", repr(value))


def mean_square(values: Tensor) -> Tensor:
    """[R] mean of the squares of [R, ...]."""
    return values.square().flatten(1).mean(1)
