"""A reference policy that follows the policy, as a part of a module: saved, resharded and resumed with it.

Of what trains, `EMAWeights` holds the reference's numbers in float32, each rank its shards, under names of their own.
To score with the reference they change places with the policy's. So no second model is kept, adapters have a reference
of their own, and another number of ranks reads them as it reads weights. Memory: 4 bytes for each trained number, and
while the reference scores, the policy's once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path

from torch import Tensor, nn

from longrl.algorithms import MovingReference
from longrl.models.ema import EMAWeights, holds_ema
from longrl.strategies.fsdp import RootModule

PREFIX = "moving_reference."
"""Where a module keeps the reference in a checkpoint, beside `model.`."""


def moving_reference_of(model: nn.Module, rule: MovingReference | None) -> EMAWeights | None:
    """The reference of a model as it is, which then follows by `EMAWeights.update`; None without a rule."""
    return None if rule is None else EMAWeights(model, rule)


def check_reference(rule: MovingReference | None, is_needed: bool) -> None:
    """Raises ValueError if a reference is to move that nothing needs."""
    if rule is not None and not is_needed:
        raise ValueError(
            "model.algorithm.moving_reference moves what the KL penalty compares with, and kl_coef=0 has none; set "
            "model.algorithm.kl_coef above 0, or moving_reference to null"
        )


@contextlib.contextmanager
def swapped(weights: EMAWeights, policy: RootModule) -> Iterator[None]:
    """Inside, `policy` computes with other weights than its own, which are back afterwards to the last bit."""
    policy.release_all()  # gathered ones are the policy's
    weights.swap_in()
    try:
        yield
    finally:
        policy.release_all()
        weights.swap_out()


# ---- in a checkpoint ----


def holds_reference(checkpoint: Path) -> bool:
    """True if a reference that has moved is in a Lightning checkpoint, a file or a folder of shards."""
    return holds_ema(checkpoint, PREFIX)


def has_reference(state: Mapping[str, Tensor]) -> bool:
    """True if a reference that has moved is among a module's tensors."""
    return any(name.startswith(PREFIX) for name in state)


def refuse_lost_reference(path: str) -> None:
    """Raises ValueError: a run would go on with another reference than its checkpoint has."""
    raise ValueError(
        f"the reference policy in --ckpt_path={path} has moved, and model.algorithm.moving_reference=null would have "
        "it back where the run began; set model.algorithm.moving_reference as that run had it, or start a new run with "
        "model.init_from"
    )


def complete(state: MutableMapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Gives the state of a run whose reference did not move the one that it had: that of a module just built."""
    for name, value in own.items():
        if name.startswith(PREFIX):
            state[name] = value
