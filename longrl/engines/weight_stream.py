"""The trainer's weights as an engine with a model of its own is given them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from longrl.models.base import CausalFamily
from longrl.models.lora import is_adapter, merged_weights, plain_name
from longrl.strategies.whole_tensors import BUCKET_BYTES

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightStream:
    """A model's weights for an engine, gathered anew by every iteration; every rank must go through."""

    family: CausalFamily
    """In the precision that the engine computes in."""
    model: nn.Module
    """Perhaps in shards."""
    bucket_bytes: int = BUCKET_BYTES
    """Of whole tensors that are gathered in one message."""
    merge: bool = True
    """False leaves adapters out, for an engine that is given them on their own."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return engine_weights(self.family, self.model, self.bucket_bytes, self.merge)


def engine_weights(
    family: CausalFamily, model: nn.Module, bucket_bytes: int = BUCKET_BYTES, merge: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The engine's names and the trainer's weights, one whole tensor after the other; every rank must go through.

    All that the engine computes with goes over, for vLLM fuses neighbours (q, k and v) and part of a group would leave
    the rest undefined. `state_dict` has tied embeddings under both names, and vLLM wants both. An encoder stays here:
    it never runs in an engine. Adapters are merged into the weights they belong to.

    Args:
        family: says what the engine calls its weights.
        model: perhaps in shards.
        bucket_bytes: of whole tensors that are gathered in one message; about as much is held beside the shards.
        merge: False gives the weights that adapters belong to as they are.
    """
    settings = family.lora if merge else None
    if settings is not None and family.dtype != "float32":
        _warn_of_rounding(family.dtype)
    needed = {}
    for name, value in model.state_dict().items():
        is_read = settings is not None if is_adapter(name) else family.engine_weight(plain_name(name)) is not None
        if is_read:
            needed[name] = value
    for name, weight in merged_weights(needed, settings, bucket_bytes=bucket_bytes):
        engine_name = family.engine_weight(name)
        if engine_name is not None:
            yield engine_name, family.engine_tensor(name, weight)


@functools.cache
def _warn_of_rounding(dtype: str) -> None:
    """Says once that the engine samples from another policy than the trainer's."""
    logger.warning(
        "LoRA's adapters are merged for the engine into weights in %s, where small changes are rounded away: in the "
        "first hundred steps of a usual learning rate most of them. VLLMServerEngine takes adapters on their own with "
        "lora: adapters, longrl.engines.hf.HFEngine reads them as they are; else correct for the difference with "
        "model.algorithm.correction", dtype
    )  # fmt: skip
