"""Groups of completions as the mini-batches of a rollout, and the losses of their tokens.

Letters: P groups, G completions of each, C = P * G, N tokens of all of them, completion after completion; R scored rows
of a micro-batch. All are this rank's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol

import torch
from torch import Tensor
from typing_extensions import TypeVar

from longrl.algorithms import Algorithm, LossOutput
from longrl.modules.step_statistics import completion_means
from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.types import Completion, Group, Packed, PolicyOutput, PromptT

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
        one_step_off: completions come from weights one step older, and the step between is part of the mismatch.
    """

    def __init__(self, max_mismatch: float = 0.1, bypass_below: float = 0.0, one_step_off: bool = False) -> None:
        self.max_mismatch = max_mismatch
        self.bypass_below = bypass_below
        self.one_step_off = one_step_off
        self.last_mean: float | None = None
        """Mean difference of the last rollout."""
        self.metrics: dict[str, float] = {}
        """Of the last rollout: `mismatch_mean`, `mismatch_max`, `mismatch_k3`, `mismatch_effective_share`."""
        self._engine_logps: list[Tensor] = []
        self._trainer_logps: list[Tensor] = []

    @property
    def bypasses_old_logp(self) -> bool:
        """True while the engine's log-probabilities may stand for the old policy's."""
        return self.last_mean is not None and self.last_mean < self.bypass_below

    def add_tokens(self, engine_logp: Tensor, trainer_logp: Tensor) -> None:
        """Some tokens of this rollout, both [N]; of those that other weights have sampled the engine's is nan."""
        self._engine_logps.append(engine_logp.detach())
        self._trainer_logps.append(trainer_logp.detach())

    def finish_rollout(self, world: Axis) -> None:
        """Sets `metrics` from what was added on all ranks; a token may be counted by several of them, then all are.

        Raises:
            RuntimeError: the mean difference is above `max_mismatch`.
        """
        none = [torch.zeros(0)]  # a rank may have scored no token
        engine_logp = torch.cat(self._engine_logps or none).cpu()  # [N]
        trainer_logp = torch.cat(self._trainer_logps or none).cpu()  # [N]
        self._engine_logps.clear()
        self._trainer_logps.clear()
        metrics = Mismatch(engine_logp, trainer_logp).metrics(world)
        self.last_mean = metrics.get("mean", self.last_mean)
        # Lightning goes on logging the last value of a metric that is left out.
        self.metrics = {f"mismatch_{name}": metrics.get(name, math.nan) for name in METRICS}
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


# -- groups ------------------------------------------------------------------------------------------------------


class ScoredSample(Protocol):
    """A completion, or another sample whose steps are its tokens."""

    @property
    def logprobs(self) -> Tensor:
        """[S] float32 log-probability of each token under the distribution it was sampled from."""


ScoredT = TypeVar("ScoredT", bound=ScoredSample, default=Completion)


@dataclass(frozen=True)
class FlatGroups(Generic[PromptT, ScoredT]):
    """The groups of a rollout as flat tensors. A rank may have none while others have some."""

    groups: Sequence[Group[PromptT, ScoredT]]
    lengths: Tensor
    """[C] sampled tokens of each completion."""
    rewards: Tensor
    """[P, G]"""
    valid: Tensor
    """[P, G] bool."""
    in_loss: Tensor
    """[P, G] bool: valid, and not left out of the loss alone."""
    baselines: Tensor | None
    """[P] rewards of greedy completions, if the groups have them."""
    sampler_logp: Tensor
    """[N] log-probabilities as the engine reported them."""
    on_policy: Tensor
    """[N] bool, True for tokens that the weights of this step sampled, False for those of carried-over groups."""
    offsets: Sequence[int]
    """P + 1 numbers: where each group's tokens begin, and the end."""


def flatten_groups(groups: Sequence[Group[PromptT, ScoredT]], device: torch.device) -> FlatGroups[PromptT, ScoredT]:
    """The groups of a step with what algorithms read of them, on `device`."""
    num_generations = len(groups[0].completions) if groups else 1  # a rank may have no group
    logprobs = [completion.logprobs for group in groups for completion in group.completions]
    lengths = torch.tensor([len(logp) for logp in logprobs], dtype=torch.int64)  # [C]
    num_tokens = lengths.view(-1, num_generations).sum(1)  # [P]
    on_policy = torch.tensor([not group.carried_over for group in groups], dtype=torch.bool)  # [P]
    no_rewards = torch.zeros(0, num_generations)
    rewards = [group.rewards[None] for group in groups]  # [1, G] each
    valid = [group.valid[None] for group in groups]
    in_loss = []
    for group in groups:
        mask = group.valid if group.in_loss is None else group.in_loss
        in_loss.append(mask[None])
    baselines = [group.baseline for group in groups if group.baseline is not None]
    baseline = None
    if len(baselines) == len(groups):
        baseline = torch.tensor(baselines, device=device)  # [P]
    return FlatGroups(
        groups=groups,
        lengths=lengths.to(device),
        rewards=torch.cat([no_rewards, *rewards]).to(device),
        valid=torch.cat([no_rewards.bool(), *valid]).to(device),
        in_loss=torch.cat([no_rewards.bool(), *in_loss]).to(device),
        baselines=baseline,
        sampler_logp=torch.cat([torch.zeros(0), *logprobs]).to(device),
        on_policy=on_policy.repeat_interleave(num_tokens).to(device),
        offsets=[0, *num_tokens.cumsum(0).tolist()],
    )


# -- mini-batches ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiniBatch(Generic[PromptT, ScoredT]):
    """The scored groups of one optimizer step."""

    groups: Sequence[Group[PromptT, ScoredT]]
    advantages: Tensor
    """[N]"""
    old_logp: Tensor | None
    """[N], or None where the policy that sampled is the one being updated."""
    ref_logp: Tensor | None
    """[N], or None without KL in the loss."""
    sampler_logp: Tensor
    """[N] as the engine reported them."""
    on_policy: Tensor
    """[N] bool, True for tokens sampled by the weights of this step."""
    weights: Tensor
    """[C] weight of every token of a completion."""
    nonfinite: Tensor
    """[C] bool, True for completions that are left out, for a score or advantage of theirs is not finite."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the loss reads beside tokens, by name."""
        named = {
            "advantages": self.advantages,
            "sampler_logp": self.sampler_logp,
            "weights": self.weights,
        }
        if self.old_logp is not None:
            named["old_logp"] = self.old_logp
        if self.ref_logp is not None:
            named["ref_logp"] = self.ref_logp
        if self.groups:
            named["rewards"] = torch.stack([group.rewards for group in self.groups])
            named["valid"] = torch.stack([group.valid for group in self.groups])
        return named


def make_mini_batches(
    flat: FlatGroups[PromptT, ScoredT],
    count: int,
    algorithm: Algorithm,
    dp: Axis,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
) -> list[MiniBatch[PromptT, ScoredT]]:
    """The groups of a rollout with their advantages, in mini-batches; every rank of the run must call it.

    Args:
        flat: this rank's groups.
        count: mini-batches, if a rank has as many groups.
        algorithm: the objective.
        dp: ranks with other groups.
        old_logp: [N] log-probabilities before the update, or None where it is the first.
        ref_logp: [N] of the reference policy, or None without KL penalty.
    """
    # 1. A completion with a score that is not finite is not valid: it enters no mean. The score becomes one without
    #    meaning, for 0 * nan would be nan.
    has_scores = finite_completions(flat.lengths, old_logp, ref_logp)  # [C]
    valid = flat.valid & has_scores.view_as(flat.valid)  # [P, G]
    if old_logp is not None:
        old_logp = old_logp.nan_to_num(0.0, 0.0, 0.0)
    if ref_logp is not None:
        ref_logp = ref_logp.nan_to_num(0.0, 0.0, 0.0)

    # 2. Advantages of the whole rollout; a KL penalty is part of the reward, or left for the loss.
    penalty = None
    if ref_logp is not None and algorithm.kl_placement == "reward":
        assert old_logp is not None
        penalty = algorithm.kl(old_logp, ref_logp)  # [N]
        ref_logp = None
    advantages = algorithm.token_advantages(  # [N]
        flat.rewards,
        valid,
        flat.lengths,
        kl=penalty,
        baseline=flat.baselines,
        all_reduce=dp.sum,
    )
    # A function of the user's may give advantages that are not finite.
    in_loss = flat.in_loss.flatten()  # [C]
    kept = in_loss & has_scores & finite_completions(flat.lengths, advantages)
    advantages = advantages.nan_to_num(0.0, 0.0, 0.0)

    # 3. Neighbouring groups, as equal in number as can be; a rank with few groups gets empty mini-batches.
    num_groups, num_generations = flat.rewards.shape
    count = min(count, dp.max(num_groups))
    edges = [num_groups * index // count for index in range(count + 1)]
    mini_batches = []
    for start, stop in itertools.pairwise(edges):
        tokens = slice(flat.offsets[start], flat.offsets[stop])
        completions = slice(start * num_generations, stop * num_generations)
        weights = algorithm.token_weights(flat.lengths[completions], kept[completions], dp.sum)  # [C]
        mini_batches.append(
            MiniBatch(
                groups=flat.groups[start:stop],
                advantages=advantages[tokens],
                old_logp=None if old_logp is None else old_logp[tokens],
                ref_logp=None if ref_logp is None else ref_logp[tokens],
                sampler_logp=flat.sampler_logp[tokens],
                on_policy=flat.on_policy[tokens],
                weights=weights,
                nonfinite=(in_loss & ~kept)[completions],
            )
        )
    return mini_batches


def finite_completions(lengths: Tensor, *scores: Tensor | None) -> Tensor:
    """Completions all of whose tokens have finite scores.

    Args:
        lengths: [C] tokens of each.
        scores: [N] each, or None.

    Returns:
        [C] bool.
    """
    finite = lengths >= 0
    for values in scores:
        if values is None:
            continue
        # `unsafe` leaves checks out for which a GPU would be waited for.
        known = values.isfinite().float()
        lowest = torch.segment_reduce(known, "min", lengths=lengths, initial=1.0, unsafe=True)
        finite = finite & lowest.bool()
    return finite


# -- losses ------------------------------------------------------------------------------------------------------


class TokenLoss(Protocol):
    """The loss of the scored rows of a micro-batch, with metrics that add up over micro-batches."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """Sums over the rows of one micro-batch."""

    def tensors(self) -> dict[str, Tensor]:
        """All that the loss reads beside tokens, by name."""


@dataclass(frozen=True)
class RolloutLoss:
    """The algorithm's objective on a mini-batch of rollouts."""

    algorithm: Algorithm
    mini_batch: MiniBatch
    monitor: MismatchMonitor | None = None
    """Also told of every token's log-probability, in the first update on a rollout."""
    entropies: list[Tensor] = field(default_factory=list)
    """Gets the mean entropies of each micro-batch's completions."""

    def __call__(self, packed: Packed, output: PolicyOutput) -> LossOutput:
        """See `TokenLoss`."""
        mini_batch = self.mini_batch
        rows = packed.token_index  # [R]
        weights = mini_batch.weights[packed.completion_index].to(output.logp.device)  # [R]
        sampler_logp = mini_batch.sampler_logp[rows]  # [R]
        if self.monitor is not None:
            comparable = mini_batch.on_policy[rows] | self.monitor.one_step_off  # [R]
            # Without a score a token does not count; to take it out, a GPU would be waited for.
            self.monitor.add_tokens(sampler_logp.where(comparable, math.nan), output.logp)
        old_logp = output.logp.detach()  # [R], of the weights being updated unless others have sampled
        if mini_batch.old_logp is not None:
            old_logp = mini_batch.old_logp[rows]
        result = self.algorithm.loss(
            logp=output.logp,
            old_logp=old_logp,
            ref_logp=None if mini_batch.ref_logp is None else mini_batch.ref_logp[rows],
            sampler_logp=sampler_logp,
            advantages=mini_batch.advantages[rows],
            weights=weights,
            completion_index=packed.completion_index,
        )
        of_completions = completion_means(output.entropy, packed.completion_index, len(mini_batch.weights))
        self.entropies.append(of_completions)
        entropy = (output.entropy * weights).sum()
        return LossOutput(result.loss, {"entropy": entropy, **result.metrics})

    def tensors(self) -> dict[str, Tensor]:
        """See `TokenLoss`."""
        return self.mini_batch.tensors()
