"""Checks of what is learned from tokens that other weights have drawn, before the first step."""

from __future__ import annotations

import logging

from longrl.modules.policy import PolicyModule

logger = logging.getLogger(__name__)


def check_stale_tokens(module: PolicyModule, max_staleness: int, bypass_below: float) -> None:
    """Checks options of the rollout that read more of a completion than its log-probabilities.

    Args:
        module: knows objective and model.
        max_staleness: the option `rollout.max_staleness`.
        bypass_below: the option `rollout.bypass_old_logp_below`.

    Raises:
        ValueError: experts are to be replayed of completions that several weights may have drawn.
    """
    if module.family.router_replay and max_staleness > 1:
        raise ValueError(
            "rollout.router_replay=true needs completions of which one router chose all experts, and with "
            f"rollout.max_staleness={max_staleness} weights change within them: what follows a cut reads the tokens "
            "before it by other experts than those that drew them; set rollout.max_staleness to 1, or "
            "rollout.router_replay to false"
        )
    if module.algorithm.decoupled and bypass_below:
        logger.warning(
            "rollout.bypass_old_logp_below has no effect with model.algorithm.decoupled=true, whose old policy is the "
            "trainer's whatever the engine says; set it to 0"
        )
