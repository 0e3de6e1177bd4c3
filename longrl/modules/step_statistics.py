"""Numbers about a training step that are no sums over tokens: norms of gradients by part, advantages, entropies.

Letters: N tokens of a rollout, R scored rows of a micro-batch, C completions of a step.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longrl.strategies.axis import Axis
from longrl.types import Metrics

PARTS = ("vision_encoder", "projector", "language_model", "lm_head")
"""Of a model, as norms of gradients are logged."""
NOT_WEIGHTED = ("loss", "grad_norm", "lr", *(f"grad_norm_{part}" for part in PARTS))
"""Metrics of a step that are no weighted sums over tokens."""
ZERO_ADVANTAGE = 1e-6
"""What is not larger is rounding."""


class StepSums:
    """Sums of named numbers over the micro-batches of a step, brought from the device at once.

    The host may be one micro-batch ahead of a GPU, which then has work while the host makes the next one ready; no
    further, so that the watchdog sees micro-batches end, and not the whole step after them.

    Example:
        sums = StepSums()
        sums.add({"loss": result.loss, **result.metrics})  # after each micro-batch
        sums.collect()  # {"loss": 0.7, ...}
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._last: torch.cuda.Event | None = None

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds numbers [] of a micro-batch, whose work is queued."""
        for name, value in values.items():
            self._values[name].append(value.detach())
        if any(value.is_cuda for value in values.values()):
            if self._last is not None:
                self._last.synchronize()
            self._last = torch.cuda.Event()
            self._last.record()

    def collect(self) -> Metrics:
        """The sums, added up in float64 in the order in which the numbers came."""
        if not self._values:
            return {}
        together = [value.double() for of_name in self._values.values() for value in of_name]
        numbers = iter(torch.stack(together).tolist())
        return {name: sum(itertools.islice(numbers, len(of_name))) for name, of_name in self._values.items()}


class UpdateMeans:
    """Means of metrics over the updates on a rollout; of weighted sums over those updates that weighed anything.

    Weights add up to less than one with Dr.GRPO's constant, and to 0 in an update whose completions are all masked:
    that one says nothing of entropy or distances, and its zeros enter no mean.
    """

    def __init__(self) -> None:
        self._totals: Metrics = defaultdict(float)
        self._num_updates = 0
        self._num_weighed = 0

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes those of an update, sums over all ranks, and `weight_sum` beside them."""
        weight_sum = metrics.get("weight_sum", 0.0)
        self._num_updates += 1
        self._num_weighed += weight_sum != 0
        for name, value in metrics.items():
            if name != "weight_sum":
                self._totals[name] += value if name in NOT_WEIGHTED else value / (weight_sum or 1.0)

    def collect(self) -> Metrics:
        """The means."""
        means = {}
        for name, total in self._totals.items():
            count = self._num_updates if name in NOT_WEIGHTED else self._num_weighed
            means[name] = total / max(count, 1)
        return means


def tensor_norms(gradients: Sequence[Tensor]) -> Tensor:
    """[n] norm of each of n gradients over all its shards, on the device that ranks talk from.

    Squares are summed in float32 whatever the gradients' precision: bfloat16 has two to three digits. Every rank of the
    run must call it.
    """
    if not gradients:
        return torch.zeros(0)
    norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
    if not isinstance(norms, DTensor):
        return norms
    moved = norms.to(norms.device_mesh.device_type)  # under offload shards are in host memory
    assert isinstance(moved, DTensor)
    return moved.full_tensor()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """[] norm of all gradients as one vector. Every rank of the run must call it."""
    return torch.linalg.vector_norm(tensor_norms(gradients))


def gradient_norms(model: nn.Module, parts: Mapping[str, Sequence[nn.Module]]) -> tuple[Tensor, Metrics]:
    """[] norm of all gradients, and as metrics: `grad_norm`, and `grad_norm_NAME` of each part that has any.

    Every rank of the run must call it, for gradients may be sharded; a GPU is waited for once.

    Args:
        model: the whole.
        parts: modules by name; of a parameter in several parts the first counts, what is in none is the language
            model's.
    """
    # 1. The part of each parameter. Sharding has replaced them since the model was built: they are looked up anew.
    part_of: dict[int, str] = {}
    for name, modules in parts.items():
        together = nn.ModuleList(modules)
        for parameter in together.parameters():
            part_of.setdefault(id(parameter), name)
    gradients: list[Tensor] = []
    places: dict[str, list[int]] = defaultdict(list)
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if parts:
            name = part_of.get(id(parameter), "language_model")
            places[f"grad_norm_{name}"].append(len(gradients))
        gradients.append(gradient)

    # 2. Every gradient is read once; what follows are norms of a few numbers.
    norms = tensor_norms(gradients)
    total = torch.linalg.vector_norm(norms)
    values = [total, *(torch.linalg.vector_norm(norms[of_part]) for of_part in places.values())]
    names = ["grad_norm", *places]
    return total, dict(zip(names, torch.stack(values).tolist(), strict=True))


def advantage_sums(advantages: Tensor) -> Metrics:
    """What `advantage_metrics` reads of a rank's advantages [N]; it adds up over ranks."""
    values = advantages.cpu().double()
    size = values.abs()
    is_zero = size <= ZERO_ADVANTAGE
    sums = {
        "size": size.sum(),
        "total": values.sum(),
        "squares": values.square().sum(),
        "zeros": is_zero.sum(),
    }
    named = {name: float(value) for name, value in sums.items()}
    named["count"] = float(len(values))
    return named


def advantage_metrics(sums: Mapping[str, float]) -> Metrics:
    """Mean absolute advantage, standard deviation and share of zeros; nan without a token.

    Args:
        sums: `advantage_sums`, over all ranks.
    """
    count = sums["count"] or math.nan
    mean = sums["total"] / count
    variance = sums["squares"] / count - mean**2
    if variance < 0:  # rounding
        variance = 0.0
    return {
        "advantage_abs": sums["size"] / count,
        "advantage_std": math.sqrt(variance),
        "advantage_zero": sums["zeros"] / count,
    }


def completion_means(values: Tensor, completion_index: Tensor, num_completions: int) -> Tensor:
    """[C] mean over the rows of each completion, infinite of one without rows here; a GPU is not waited for.

    Args:
        values: [R]
        completion_index: [R] which completion a row belongs to.
        num_completions: C of the step.
    """
    sums = values.new_zeros(num_completions).index_add(0, completion_index, values)
    counts = values.new_zeros(num_completions).index_add(0, completion_index, torch.ones_like(values))
    return torch.where(counts > 0, sums / counts, math.inf)


def lowest_over_ranks(values: Sequence[Tensor], world: Axis) -> float:
    """The smallest of all ranks' numbers, nan of none that is below infinity. Every rank of the axis must call it.

    Args:
        values: [C] each.
        world: the ranks.
    """
    lowest = math.inf
    if values:
        lowest = float(torch.cat(list(values)).min())
    lowest = -world.max(-lowest)
    if math.isinf(lowest):
        return math.nan
    return lowest
