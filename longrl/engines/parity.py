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

from longrl.strategies.axis import SINGLE_RANK, Axis
from longrl.types import Completion, Prompt

NUM_SHOWN = 8
"""Tokens in the message of a failed comparison."""
METRICS = ("mean", "max", "k3", "effective_share")
"""Names in `Mismatch.metrics`."""


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


def rendering_differences(prompt: Prompt, rendered: RenderedPrompt, features: Mapping[str, Tensor]) -> list[str]:
    """Lines that say where trainer and engine read a prompt differently; none if they agree."""
    known: Tensor | slice = slice(None)
    if len(rendered.input_ids) == len(prompt.input_ids):
        known = rendered.input_ids >= 0
    positions = rendered.position_ids
    if positions is None:
        positions = torch.arange(len(rendered.input_ids))[None]  # [1, T]
    pairs = {
        "input_ids": (prompt.input_ids[known], rendered.input_ids[known]),
        "position_ids": (prompt.position_ids, positions),
    }
    for key, rows in rendered.features.items():
        pairs[f"features of {key}"] = (features[key], rows)
    lines = []
    for name, (trainer, engine) in pairs.items():
        if trainer.shape != engine.shape:
            lines.append(f"  {name}: trainer {list(trainer.shape)}, engine {list(engine.shape)}")
            continue
        trainer = trainer.cpu()
        engine = engine.to(trainer.dtype).cpu()
        differing = (trainer != engine).nonzero()
        if len(differing):
            index = differing[0].tolist()
            values = f"trainer {trainer[tuple(index)].item()}, engine {engine[tuple(index)].item()}"
            lines.append(f"  {name}: from {index} on, {values}")
    return lines


def check_rendered_prompts(
    prompts: Sequence[Prompt], rendered: Sequence[RenderedPrompt], features: Mapping[str, Tensor]
) -> None:
    """Raises RuntimeError with a diff if the engine reads a prompt in another way than the trainer.

    Args:
        prompts: as the trainer renders them.
        rendered: as the engine reads them; empty for an engine that reads the trainer's.
        features: media key -> [n, D].
    """
    lines = []
    for prompt, item in zip(prompts, rendered, strict=bool(rendered)):
        differences = rendering_differences(prompt, item, features)
        if differences:
            media = ", ".join(f"{m.kind} {m.grid_thw} every {m.seconds_per_temporal_patch:.3f} s" for m in prompt.media)
            lines += [f"prompt {prompt.id!r}, {len(prompt.input_ids)} tokens, media [{media}]:", *differences]
    if lines:
        raise RuntimeError(
            "engine and trainer read the same prompts differently, so the engine would sample from another model than "
            "the one trained:\n" + "\n".join(lines) + "\nCheck that model.family and the engine read the same folder, "
            "and that vLLM is the version longrl is written for; longrl.engines.hf.HFEngine needs no agreement"
        )


# -- what it made of it --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """How far apart engine and trainer are on the engine's own tokens."""

    engine_logp: Tensor
    """[N] log-probabilities the engine reported."""
    trainer_logp: Tensor
    """[N] of the same tokens under the trainer's forward pass."""

    def metrics(self, world: Axis = SINGLE_RANK) -> dict[str, float]:
        """Mean and largest absolute difference, k3 estimate of KL(engine || trainer), share of effective samples.

        k3 is that of Schulman's note, exp(d) - 1 - d with d trainer less engine; the effective sample size is that of
        importance weights exp(d) (Kong 1992), as a share of the number of tokens. Tokens without a finite score do not
        count; without any token there are no metrics.

        Args:
            world: ranks whose tokens count together; all must call it.
        """
        difference = (self.trainer_logp - self.engine_logp).double()  # [N]
        difference = difference[difference.isfinite()].clamp(-20, 20)  # one token must not make exp(d) infinite
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
        largest = max(world.gather(float(distance.max()) if len(distance) else 0.0))
        tokens = sums["tokens"]
        if not tokens:
            return {}
        return {
            "mean": sums["distance"] / tokens,
            "max": largest,
            "k3": sums["k3"] / tokens,
            "effective_share": sums["weights"] ** 2 / (sums["squares"] * tokens),
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
        """Metrics of the last rollout: `mismatch_mean` and so on."""
        self._engine_logps: list[Tensor] = []
        self._trainer_logps: list[Tensor] = []

    @property
    def bypasses_old_logp(self) -> bool:
        """Whether the engine's log-probabilities may stand for the old policy's."""
        return self.last_mean is not None and self.last_mean < self.bypass_below

    def add_tokens(self, engine_logp: Tensor, trainer_logp: Tensor) -> None:
        """Some tokens of this rollout that the weights being updated have sampled, both [N]."""
        self._engine_logps.append(engine_logp.detach())
        self._trainer_logps.append(trainer_logp.detach())

    def finish_rollout(self, world: Axis) -> None:
        """Sets `metrics` from what was added on all ranks; a token may be counted by several of them, then all are.

        Raises:
            RuntimeError: the mean difference is above `max_mismatch`.
        """
        none = torch.zeros(0)  # a rank may have scored no token
        engine_logp = torch.cat([none, *(logp.cpu() for logp in self._engine_logps)])
        trainer_logp = torch.cat([none, *(logp.cpu() for logp in self._trainer_logps)])
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
        """What a run above `max_mismatch` ends with."""
        return (
            f"engine and trainer have parted: the log-probabilities of this step's tokens differ by {metrics}, "
            f"mean above max_mean_mismatch={self.max_mismatch}; this step did not change the weights. Go on from the "
            "last checkpoint with --ckpt_path RUN/checkpoints/last.ckpt: engine weights are handed over anew. If it "
            "happens again raise rollout.max_mean_mismatch, or use longrl.engines.hf.HFEngine"
        )


def check_mismatch(
    mismatch: Mismatch, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], max_mismatch: float
) -> None:
    """Raises RuntimeError with a table of the tokens that differ most if any differs by more than `max_mismatch`.

    Args:
        mismatch: of the completions' tokens, in their order.
        prompts: P prompts.
        completions: greedy ones of each prompt.
        max_mismatch: largest difference of a log-probability that rounding explains.
    """
    difference = (mismatch.trainer_logp - mismatch.engine_logp).abs()  # [N]
    if not len(difference) or float(difference.max()) <= max_mismatch:
        return
    tokens = [
        (prompt.id, index, int(token))
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
        for index, token in enumerate(completion.token_ids)
    ]
    lines = []
    for row in torch.topk(difference, min(NUM_SHOWN, len(difference))).indices.tolist():
        prompt_id, index, token = tokens[row]
        lines.append(
            f"  prompt {prompt_id!r}, token {index} (id {token}): engine {float(mismatch.engine_logp[row]):.4f}, "
            f"trainer {float(mismatch.trainer_logp[row]):.4f}"
        )
    lengths = ", ".join(f"{item.id!r} {len(item.input_ids)} tokens, {len(item.media)} media" for item in prompts)
    raise RuntimeError(
        f"engine and trainer disagree by up to {float(difference.max()):.4f} in the log-probability of a greedy token, "
        f"more than max_mismatch={max_mismatch}; training would follow another model than the one that samples. "
        "The tokens that differ most:\n" + "\n".join(lines) + f"\nPrompts: {lengths}. Check that "
        "engine and family read the same folder and dtype (a difference of 0.1 is usual in bfloat16), or raise "
        "rollout.max_mismatch"
    )


def engine_logps(completions: Sequence[Sequence[Completion]]) -> Tensor:
    """[N] log-probabilities of all tokens, as the engine reported them."""
    logps = [completion.logprobs for group in completions for completion in group]
    return torch.cat([torch.zeros(0), *logps])
