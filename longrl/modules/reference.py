"""The reference policy of the KL penalty: the policy that a run began with."""

from __future__ import annotations

import torch

from longrl.models.base import CausalFamily
from longrl.modules.weights import build_from
from longrl.parallel import Parallel
from longrl.strategies.fsdp import Entry


def reference_of(
    policy: Entry, family: CausalFamily, init_from: str | None, parallel: Parallel, device: torch.device
) -> Entry:
    """The door to the reference's weights.

    With adapters those are the policy's own, for scoring switches the adapters off (`adapters_off`): `init_from` was
    merged into frozen weights, and the adapters began at zero. Else they are a second model.
    """
    if family.lora is not None:
        return policy
    reference = build_from(family, init_from).eval().requires_grad_(False)
    entry = parallel.wrap(family, reference)
    reference.to(device)
    return entry
