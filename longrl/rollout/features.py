"""Media features: each distinct image or video goes through the tower once and serves everyone who needs it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from longrl.models.base import ModelFamily
from longrl.types import Media, Prompt


def distinct_media(prompts: Iterable[Prompt]) -> list[Media]:
    """The media of all prompts, each key once, in the order met."""
    return list({media.key: media for prompt in prompts for media in prompt.media}.values())


class FeatureCache:
    """Features by media key, least recently used first out. Valid as long as the tower's weights are.

    Args:
        family: whose tower encodes.
        max_bytes: what features kept from earlier steps may take; those of the current call always stay.
    """

    def __init__(self, family: ModelFamily, max_bytes: int = 1 << 30) -> None:
        self.family = family
        self.max_bytes = max_bytes
        self.num_encoded = 0
        """Media sent through the tower so far."""
        self.num_requested = 0
        """Distinct media asked for, summed over calls."""
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def get_or_encode(self, model: nn.Module, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """{media key: [N, D] features} of the prompts, without gradient."""
        media = distinct_media(prompts)
        missing = [item for item in media if item.key not in self._features]
        with torch.no_grad():
            # One by one: a GPU or BLAS rounds by the size of a call, and what is kept must not depend on what it was
            # encoded with. The cache of a resumed run is empty, and its missing media are others.
            for item in missing:
                (self._features[item.key],) = self.family.encode_media(model, [item])
        self.num_encoded += len(missing)
        self.num_requested += len(media)
        for item in media:
            self._features.move_to_end(item.key)
        found = {item.key: self._features[item.key] for item in media}
        self._evict(keep=len(found))
        return found

    def clear(self) -> None:
        """Forgets everything: the tower's weights have changed."""
        self._features.clear()

    def _evict(self, keep: int) -> None:
        size = sum(tensor.nbytes for tensor in self._features.values())
        while size > self.max_bytes and len(self._features) > keep:
            _, oldest = self._features.popitem(last=False)
            size -= oldest.nbytes


class TrainableFeatures:
    """Features of a tower that trains: encoded once per optimizer step, with one backward pass through the tower.

    Micro-batches read `leaves` and leave their gradients there; `backward` sends the sum through the tower.

    Example:
        features = TrainableFeatures(family, model, prompts)
        for packed in micro_batches:
            loss(family.forward(model, packed, features.leaves)).backward()
        features.backward()
    """

    def __init__(self, family: ModelFamily, model: nn.Module, prompts: Sequence[Prompt]) -> None:
        media = distinct_media(prompts)
        self._encoded = family.encode_media(model, media)
        self.leaves = {
            item.key: features.detach().requires_grad_()
            for item, features in zip(media, self._encoded, strict=True)
        }

    def backward(self) -> None:
        """Adds the tower's gradients. Media that no micro-batch used have none."""
        used = [
            (features, leaf.grad)
            for features, leaf in zip(self._encoded, self.leaves.values(), strict=True)
            if leaf.grad is not None
        ]
        if used:
            torch.autograd.backward(*map(list, zip(*used, strict=True)))
