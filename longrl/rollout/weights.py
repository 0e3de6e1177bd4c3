"""What an engine with a model of its own is handed of the trainer's weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longrl.models.base import CausalFamily


def engine_weights(family: CausalFamily, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The engine's names and the trainer's weights, one whole tensor at a time; every rank of the run must go through.

    All that the engine computes with goes over, for vLLM fuses neighbours (q, k and v) and part of a group would leave
    the rest undefined. `state_dict` has tied embeddings under both names, and vLLM wants both. A tower stays here: it
    never runs in an engine.
    """
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        known_as = family.engine_weight(name)
        if known_as is not None:
            yield known_as, family.engine_tensor(name, whole)
