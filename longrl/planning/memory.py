"""How much memory a device needs in each phase of a step, by kind, and what to do when that is too much."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longrl.planning import formulas as f
from longrl.planning.formulas import MemoryParts
from longrl.planning.hardware import GIB
from longrl.planning.inputs import Plan, micro_batch, needed_budget

FramesRule = Callable[[Plan, int], Plan]
"""The same run with another number of frames per video."""
MAX_CHANGES = 12
MAX_FRAMES = 1 << 16
LEAST_CHUNK = 4096
"""A smaller `prefill_chunk_tokens` saves hardly anything, and is slow."""
CHUNK = 8192
"""Value of `mlp_chunk_tokens`: rows enough to keep a GPU's matrix products busy."""
HELPFUL = 0.98
"""A change that leaves more of the peak than this is not worth naming."""

# ------------------------------------------------------------------------------------------------------------ phases


def encode_phase(plan: Plan) -> MemoryParts:
    """The encoder's calls, or the gathering of features while those of the batch before are still there."""
    activations, exchange = f.encoder_activations(plan), f.feature_exchange(plan)
    largest = {"encoder activations": activations} if activations > exchange else {"feature exchange": exchange}
    return f.standing_memory(plan) | largest


def rollout_phase(plan: Plan) -> MemoryParts:
    """Prefill and decoding."""
    return f.standing_memory(plan) | {
        "gathered weights": f.gathered_policy(plan),
        "KV cache": f.kv_cache(plan),
        "activations": max(f.prefill_memory(plan), f.decoding_memory(plan)),
    }


def score_phase(plan: Plan) -> MemoryParts:
    """Old and reference log-probabilities, without gradient."""
    batch = micro_batch(plan)
    rows = batch.local_rows(plan)
    return f.standing_memory(plan) | {
        "gathered weights": f.gathered_root(plan) + f.gathered_layers(plan),
        "activations": f.forward_working_set(plan, rows),
        "logits": f.logit_memory(plan, batch.scored, backward=False),
    }


def update_phase(plan: Plan) -> MemoryParts:
    """The largest moment of forward, backward and optimizer step."""
    return max(_update_moments(plan), key=lambda parts: sum(parts.values()))


def _update_moments(plan: Plan) -> list[MemoryParts]:
    """The LM head goes backward; the last layer; the one before; the root's gradients are summed; the optimizer.

    The first micro-batch of a step finds no gradients: they count before the end only if there are more.
    """
    batch = micro_batch(plan)
    rows = batch.local_rows(plan)
    standing = f.standing_memory(plan)
    all_gradients = f.gradient_memory(plan)
    earlier = (all_gradients if batch.count > plan.mini_batches else 0.0) + f.head_gradient(plan)
    saved, ends = f.layers_saved(plan, rows), f.ends_saved(plan, rows)
    one_layer = saved / len(plan.sizes.layer_params)
    work = f.layer_backward(plan, rows)
    root, casts = f.gathered_root(plan), f.weight_casts(plan)
    layers = root + f.gathered_layers(plan) + casts
    first, second = f.layer_gradients(plan, before=False), f.layer_gradients(plan, before=True)
    logits = f.logit_memory(plan, batch.scored, backward=True)
    moments: list[MemoryParts] = [
        {"gathered weights": root + casts, "activations": saved + ends, "gradients": earlier, "logits": logits},
        {"gathered weights": layers, "activations": saved + ends + work, "gradients": earlier + first},
        {"gathered weights": layers, "activations": saved - one_layer + ends + work, "gradients": earlier + second},
        {"gathered weights": root, "gradients": all_gradients + f.root_reduction(plan)},
        {"gradients": all_gradients, "optimizer": standing["optimizer"] + f.optimizer_working_set(plan)},
    ]
    return [standing | moment for moment in moments]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device, {phase: {kind: bytes}}."""

    phases: dict[str, MemoryParts]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        """Bytes that a device must have."""
        return self.total(self.peak_phase)

    @property
    def largest(self) -> str:
        """The kind that takes most of the peak."""
        parts = self.phases[self.peak_phase]
        return max(parts, key=lambda kind: parts[kind])

    def total(self, phase: str) -> float:
        """Bytes of one phase."""
        return sum(self.phases[phase].values())


def estimate_memory(plan: Plan) -> MemoryEstimate:
    """All phases of a step. Scoring is left out if there is nothing to score with.

    Raises:
        ValueError: a prompt with one completion is over the budget of a micro-batch.
    """
    phases = {"encode": encode_phase(plan), "rollout": rollout_phase(plan), "update": update_phase(plan)}
    if plan.reference or plan.mini_batches * plan.epochs > 1:
        phases["score"] = score_phase(plan)
    return MemoryEstimate(phases)


# -------------------------------------------------------------------------------------------- does it fit, and if not


@dataclass(frozen=True)
class FitVerdict:
    """Whether a run fits its devices."""

    fits: bool
    text: str
    """One line for the user, with the remedy if it does not."""


def fit_verdict(plan: Plan, available_bytes: float, with_frames: FramesRule | None = None) -> FitVerdict:
    """Whether the largest phase fits, what takes most, and what to change.

    Args:
        plan: the run.
        available_bytes: memory of a device.
        with_frames: lets the remedy name a number of frames.
    """
    need = estimate_memory(plan)
    sizes = f"{need.peak / GIB:.1f} GiB of {available_bytes / GIB:.1f} GiB"
    if need.peak <= available_bytes:
        return FitVerdict(True, f"fits: needs {sizes}; the largest part is {_largest(need)}")
    remedy = "; ".join(find_remedies(plan, available_bytes, with_frames))
    return FitVerdict(False, f"does not fit: needs {sizes}; the largest part is {_largest(need)}; remedy: {remedy}")


def _largest(need: MemoryEstimate) -> str:
    size = need.phases[need.peak_phase][need.largest]
    return f"{need.largest} ({size / GIB:.1f} GiB, in the {need.peak_phase} phase)"


def find_remedies(plan: Plan, available_bytes: float, with_frames: FramesRule | None = None) -> list[str]:
    """Options to set, so that the run fits: one if one is enough, else several, the cheapest that help first."""
    changed: dict[str, object] = {}
    for _ in range(MAX_CHANGES):
        now = estimate_memory(plan).peak
        options = [(*option, estimate_memory(option[2]).peak) for option in _changes(plan)]
        fitting = [option for option in options if option[3] <= available_bytes]
        helpful = fitting or [option for option in options if option[3] < HELPFUL * now]
        if not helpful:
            break
        name, value, plan, _ = helpful[0]
        changed[name] = value
        if fitting:
            return [f"{name}={value}" for name, value in changed.items()]
    frames = largest_frames(plan, available_bytes, with_frames) if with_frames else 0
    last = f"data.video.max_frames={frames}" if frames else "lower data.video.max_frames, or take larger devices"
    return [*(f"{name}={value}" for name, value in changed.items()), last]


def _changes(plan: Plan) -> Iterator[tuple[str, object, Plan]]:
    """(Option, value, the run with it), those that cost least first."""
    strategy, change = "trainer.strategy.init_args", dataclasses.replace
    if not plan.gradient_checkpointing:
        yield "model.family.init_args.gradient_checkpointing", "true", change(plan, gradient_checkpointing=True)
    if plan.mlp_chunk_tokens is None:
        yield "model.family.init_args.mlp_chunk_tokens", CHUNK, change(plan, mlp_chunk_tokens=CHUNK)
    budget, count, prompts = needed_budget(plan), plan.num_generations, plan.prompts_per_batch // 2
    if plan.max_tokens_per_micro_batch > budget:
        yield "model.max_tokens_per_micro_batch", budget, change(plan, max_tokens_per_micro_batch=budget)
    if f.prefilled_prompts(plan) > 1:
        yield "the engine's max_sequences", count, change(plan, max_sequences=count)
    if plan.prefill_chunk_tokens > LEAST_CHUNK:
        yield "the engine's prefill_chunk_tokens", LEAST_CHUNK, change(plan, prefill_chunk_tokens=LEAST_CHUNK)
    for sp in (2, 4, 8):
        if sp > plan.sequence_parallel_size and plan.devices % sp == 0:
            shared = change(plan, sequence_parallel_size=sp, sp_group_size=sp)
            budget = max(needed_budget(shared), -(-plan.max_tokens_per_micro_batch * plan.sequence_parallel_size // sp))
            yield f"{strategy}.sequence_parallel_size", sp, change(shared, max_tokens_per_micro_batch=budget)
    if plan.gradient_checkpointing and not plan.offload_checkpoints:
        yield "model.family.init_args.offload_checkpoints", "true", change(plan, offload_checkpoints=True)
    if not plan.optimizer_offload and not plan.offload:
        yield "model.optimizer.offload", "true", change(plan, optimizer_offload=True)
    if plan.gathered_bytes > 2:
        yield f"{strategy}.sharding.compute_dtype", "bfloat16", change(plan, gathered_bytes=2)
    if prompts:
        yield "data.prompts_per_batch", prompts, change(plan, prompts_per_batch=prompts)
    if not plan.offload:
        yield f"{strategy}.sharding.offload", "true", change(plan, offload=True)
    if plan.reference:
        yield "model.algorithm.kl_coef", 0, change(plan, reference=False)


def largest_frames(plan: Plan, available_bytes: float, with_frames: FramesRule) -> int:
    """The longest video, in frames, with which the run still fits; 0 if none does."""

    def fits(frames: int) -> bool:
        return estimate_memory(with_frames(plan, frames)).peak <= available_bytes

    low, high = 0, 1
    while fits(high):  # upwards, for far beyond the pixel budget of a video rounding makes longer ones smaller
        if high == MAX_FRAMES:
            return MAX_FRAMES
        low, high = high, 2 * high
    return bisect.bisect_left(range(low + 1, high), True, key=lambda frames: not fits(frames)) + low
