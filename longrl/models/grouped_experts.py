"""How the experts of a mixture are computed: by grouped matrix products where torch has them, else one by one.

A grouped product computes all experts of a layer in one call, and adds a token's up in a fixed order; one by one is a
loop over experts in Python, that on a GPU waits for the number of tokens of each. Chosen once, when a model is built.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

GROUPED = "grouped_mm"
ONE_BY_ONE = "eager"
"""Names of transformers' own implementations."""
OLDEST_CAPABILITY = (8, 0)
"""Of an NVIDIA GPU, for torch's grouped product: Ampere."""


def choose_experts(model: Any) -> None:
    """Sets how transformers computes the experts of a model's text stack; nothing in a dense one."""
    if not getattr(model.config.get_text_config(), "num_experts", None):
        return
    name, reason = experts_implementation()
    model.get_decoder().set_experts_implementation(name)  # of the whole, InternVL's class would refuse it
    logger.info("experts are computed by %s: %s", name, reason)


def experts_implementation() -> tuple[str, str]:
    """The implementation for this machine, and why."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return ONE_BY_ONE, f"torch {torch.__version__} has no grouped product"
    if not torch.cuda.is_available():
        return GROUPED, f"torch {torch.__version__} on a CPU has it"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return ONE_BY_ONE, f"grouped products need capability {OLDEST_CAPABILITY}, the GPU has {capability}"
    return GROUPED, f"torch {torch.__version__} on a GPU of capability {capability} has it"
