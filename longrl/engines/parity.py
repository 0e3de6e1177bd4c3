"""Does the engine see what the trainer sees? Compared before the first step, and measured in every step after.

Engines go silently wrong: other positions behind a video, other frames, stale weights. What they were given shows in
token ids, grids, times and positions; what they made of it in log-probabilities. N is a number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longrl.strategies.axis import Axis
from longrl.types import Completion, Prompt

NUM_SHOWN = 8
"""Tokens in the message of a failed check."""
METRICS = ("mean", "max", "k3", "effective_share")
"""Of `mismatch_metrics`."""


# -- what the engine was given -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as an engine reads it."""

    input_ids: Tensor
    """[T] with media placeholders expanded; -1 where a feature stands and the engine keeps no id."""
    position_ids: Tensor | None = None
    """[A, T]; None if the engine counts 0, 1, 2, ..."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """media key -> [n, D] rows the engine puts in place of the placeholders."""


def differences(prompt: Prompt, seen: RenderedPrompt, features: Mapping[str, Tensor]) -> list[str]:
    """Lines that say where trainer and engine read a prompt differently; none if they agree."""
    found = []
    known = seen.input_ids >= 0 if len(seen.input_ids) == len(prompt.input_ids) else slice(None)
    positions = torch.arange(len(seen.input_ids))[None] if seen.position_ids is None else seen.position_ids
    for name, trainer, engine in (
        ("input_ids", prompt.input_ids[known], seen.input_ids[known]),
        ("position_ids", prompt.position_ids, positions),
        *((f"features of {key}", features[key], rows) for key, rows in seen.features.items()),
    ):
        if trainer.shape != engine.shape:
            found.append(f"  {name}: trainer {list(trainer.shape)}, engine {list(engine.shape)}")
        elif not torch.equal(trainer.cpu(), engine.to(trainer.dtype).cpu()):
            place = (trainer.cpu() != engine.to(trainer.dtype).cpu()).nonzero()[0].tolist()
            pair = (trainer[tuple(place)].item(), engine[tuple(place)].item())
            found.append(f"  {name}: from {place} on, trainer {pair[0]}, engine {pair[1]}")
    return found


def check_seen(prompts: Sequence[Prompt], seen: Sequence[RenderedPrompt], features: Mapping[str, Tensor]) -> None:
    """Raises RuntimeError with a diff if the engine reads a prompt in another way than the trainer.

    Args:
        prompts: as the trainer renders them.
        seen: as the engine reads them, or none.
        features: media key -> [n, D].
    """
    lines = []
    for prompt, item in zip(prompts, seen, strict=bool(seen)):
        found = differences(prompt, item, features)
        if found:
            media = ", ".join(f"{m.kind} {m.grid_thw} every {m.seconds_per_temporal_patch:.3f} s" for m in prompt.media)
            lines += [f"prompt {prompt.id!r}, {len(prompt.input_ids)} tokens, media [{media}]:", *found]
    if lines:
        raise RuntimeError(
            "engine and trainer read the same prompts differently, so the engine would sample from another model than "
            "the one trained:\n" + "\n".join(lines) + "\nCheck that model.family and the engine read the same folder, "
            "and that vLLM is the version longrl is written for; longrl.engines.hf.HFEngine needs no agreement"
        )


# -- what it made of it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """How far apart engine and trainer are on the engine's own tokens. Tokens without a finite score do not count.

    k3 is that of Schulman's note, exp(d) - 1 - d with d trainer less engine; the effective sample size is that of
    importance weights exp(d) (Kong 1992), as a share of the number of tokens.
    """

    engine_logp: Tensor
    """[N] log-probabilities the engine reported."""
    trainer_logp: Tensor
    """[N] of the same tokens under the trainer's forward pass."""

    @property
    def difference(self) -> Tensor:
        """[N] trainer less engine."""
        return self.trainer_logp - self.engine_logp

    def sums(self) -> dict[str, float]:
        """What adds up over micro-batches and ranks to `mismatch_metrics`; the largest difference does not."""
        difference = self._finite()
        weights = difference.exp()
        return {
            "tokens": float(len(difference)),
            "distance": float(difference.abs().sum()),
            "k3": float((weights - 1 - difference).sum()),
            "weights": float(weights.sum()),
            "squares": float(weights.square().sum()),
        }

    def largest(self) -> float:
        """Largest absolute difference, 0 without tokens."""
        return float(self._finite().abs().max()) if len(self._finite()) else 0.0

    def metrics(self) -> dict[str, float]:
        """See `mismatch_metrics`."""
        return mismatch_metrics(self.sums(), self.largest())

    def _finite(self) -> Tensor:
        difference = self.difference.double()
        return difference[difference.isfinite()].clamp(-20, 20)


def mismatch_metrics(sums: Mapping[str, float], largest: float) -> dict[str, float]:
    """Mean and largest absolute difference, k3 estimate of KL(engine || trainer), share of effective samples."""
    if not sums["tokens"]:
        return {}
    return {
        "mean": sums["distance"] / sums["tokens"],
        "max": largest,
        "k3": sums["k3"] / sums["tokens"],
        "effective_share": sums["weights"] ** 2 / (sums["squares"] * sums["tokens"]),
    }


class MismatchMonitor:
    """Measures the gap in the first forward pass of every rollout, and ends a run whose engine has parted from it.

    The first mini-batch is scored by the weights that sampled it, so measuring costs nothing.

    Args:
        max_mismatch: largest mean difference of a step; above it the run ends before its weights change.
        ahead: the completions come from weights one step older, and the step between is part of the gap.
        trust_below: while the mean of the last rollout is below it, the engine's log-probabilities serve as the old
            policy's, and the pass that computes those is left out; 0 never.
    """

    def __init__(self, max_mismatch: float = 0.1, trust_below: float = 0.0, ahead: bool = False) -> None:
        self.max_mismatch = max_mismatch
        self.ahead = ahead
        self.trust_below = trust_below
        self.last: float | None = None
        """Mean difference of the last rollout."""
        self.metrics: dict[str, float] = {}
        """Of the last rollout."""
        self._gaps: list[Mismatch] = []

    @property
    def bypasses_old_logp(self) -> bool:
        """Whether the engine's log-probabilities may stand for the old policy's."""
        return self.last is not None and self.last < self.trust_below

    def add(self, engine_logp: Tensor, trainer_logp: Tensor) -> None:
        """Some tokens of this rollout that the weights being updated have sampled, both [N]."""
        self._gaps.append(Mismatch(engine_logp.detach(), trainer_logp.detach()))

    def close(self, world: Axis) -> None:
        """Sets `metrics` from what was added on all ranks; a token may be counted by several of them, then all are.

        Raises:
            RuntimeError: the mean difference is above `max_mismatch`.
        """
        none = [torch.zeros(0)]
        engine = torch.cat([gap.engine_logp.cpu() for gap in self._gaps] + none)
        trainer = torch.cat([gap.trainer_logp.cpu() for gap in self._gaps] + none)
        own, self._gaps = Mismatch(engine, trainer), []
        metrics = mismatch_metrics(world.sum_dict(own.sums()), max(world.gather(own.largest())))
        self.last = metrics.get("mean", self.last)
        # Lightning goes on logging the last value of a metric that is left out.
        self.metrics = {f"mismatch_{name}": metrics.get(name, math.nan) for name in METRICS}
        if metrics and metrics["mean"] > self.max_mismatch:
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in metrics.items())
            raise RuntimeError(self.parted(numbers))

    def parted(self, numbers: str) -> str:
        """What a run above `max_mismatch` ends with."""
        return (
            f"engine and trainer have parted: the log-probabilities of this step's tokens differ by {numbers}, "
            f"mean above max_mean_mismatch={self.max_mismatch} of the RolloutCallback; this step did not change the weights. "
            "Go on from the last checkpoint with --ckpt_path RUN/checkpoints/last.ckpt: engine weights are handed "
            "over anew. If it happens again raise max_mean_mismatch, or use longrl.engines.hf.HFEngine"
        )


def check(
    gap: Mismatch, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], max_mismatch: float
) -> None:
    """Raises RuntimeError with a table of the tokens that differ most if any differs by more than `max_mismatch`."""
    difference = gap.difference.abs()
    if not len(difference) or float(difference.max()) <= max_mismatch:
        return
    tokens = [
        (prompt.id, place, int(token))
        for prompt, own in zip(prompts, completions, strict=True)
        for completion in own
        for place, token in enumerate(completion.token_ids)
    ]
    worst = torch.topk(difference, min(NUM_SHOWN, len(difference))).indices.tolist()
    lines = [
        f"  prompt {tokens[row][0]!r}, token {tokens[row][1]} (id {tokens[row][2]}): engine "
        f"{float(gap.engine_logp[row]):.4f}, trainer {float(gap.trainer_logp[row]):.4f}"
        for row in worst
    ]
    lengths = ", ".join(f"{item.id!r} {len(item.input_ids)} tokens, {len(item.media)} media" for item in prompts)
    raise RuntimeError(
        f"engine and trainer disagree by up to {float(difference.max()):.4f} in the log-probability of a greedy token, "
        f"more than max_mismatch={max_mismatch} of the RolloutCallback; training would follow another model than the one that "
        f"samples. The tokens that differ most:\n" + "\n".join(lines) + f"\nPrompts: {lengths}. Check that engine and "
        "family read the same folder and dtype (a difference of 0.1 is usual in bfloat16), or raise max_mismatch"
    )


def stacked(completions: Sequence[Sequence[Completion]]) -> Tensor:
    """[N] log-probabilities of all tokens, as the engine reported them."""
    parts = [completion.logprobs for own in completions for completion in own]
    return torch.cat([torch.zeros(0), *parts])
