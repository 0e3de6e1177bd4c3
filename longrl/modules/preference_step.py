"""The optimizer step on pairs, and what the policy prefers among pairs that it does not train on.

A pair is a group of two: its prompt is computed once for both answers, its media are encoded once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrl.modules.expert_load import ExpertLoads
from longrl.modules.preference_loss import PreferenceLoss, token_answers
from longrl.modules.scoring import all_media
from longrl.types import Batch, Continuation, Metrics, Prompt

if TYPE_CHECKING:
    from longrl.modules.policy import PolicyModule

logger = logging.getLogger(__name__)


def preference_step(policy: PolicyModule, batch: Batch) -> Metrics:
    """One optimizer step on the pairs of a batch; returns its metrics. Every rank of the run must call it."""
    # 1. What the policy that the run began with says of the answers.
    pairs = [answers_of(prompt) for prompt in batch.prompts]
    features: dict[str, Tensor] = {}
    if not policy.vision_encoder_trains:
        features = policy.features.get_or_encode(policy.model, all_media(batch.prompts, pairs))
    ref_logp = policy.reference_logp(batch.prompts, pairs, features)  # [N]

    # 2. The step.
    counted = torch.tensor(len(pairs), device=policy.device)
    num_pairs = int(policy.parallel.dp.sum(counted))
    shift = policy.reward_shift.mean
    loss = PreferenceLoss.of_pairs(policy.preference, pairs, ref_logp, num_pairs, shift, policy.device)
    loads = ExpertLoads()
    metrics = policy.take_step(batch.prompts, pairs, features, loss, loads)
    if policy.features.disk:
        policy.log_dict(policy.features.metrics(), batch_size=1)

    # 3. The shift of later steps; a step that was left out is none.
    if policy.preference.quality_weight:
        metrics["reward_shift"] = shift
        if not policy.skipped_steps.in_a_row:
            mean = (metrics["reward_chosen"] + metrics["reward_rejected"]) / 2
            policy.reward_shift.add(mean, 2 * num_pairs)
    return metrics | loads.metrics(policy.parallel.world)


def preference_validation(policy: PolicyModule, batch: Batch) -> dict[str, tuple[float, int]]:
    """Name -> sum and count over this rank's pairs: `loss`, `preference_accuracy` and the like.

    Prompts that are no pairs are left out. Every rank must call it; one may have no pair.
    """
    prompts = [prompt for prompt in batch.prompts if prompt.rejected is not None]
    if not policy.parallel.dp.max(len(prompts)):
        return {}
    pairs = [answers_of(prompt) for prompt in prompts]
    features = policy.features.get_or_encode(policy.model, all_media(prompts, pairs))
    ref_logp = policy.reference_logp(prompts, pairs, features)
    logp = policy.score(policy.policy, prompts, pairs, features)  # [N]
    loss = PreferenceLoss.of_pairs(policy.preference, pairs, ref_logp, 1, policy.reward_shift.mean, policy.device)
    losses, values = loss.of_sums(loss.sums(logp, token_answers(pairs, policy.device)))
    return {name: (float(each.sum()), len(pairs)) for name, each in {"loss": losses, **values}.items()}


def warn_without_pairs(policy: PolicyModule) -> None:
    """Says that an objective on pairs has no effect in another stage."""
    if policy.preference_is_given and not policy.learns_pairs():
        logger.warning("model.preference has no effect without data.stage=preference; set that, or leave it out")


def answers_of(prompt: Prompt) -> list[Continuation]:
    """Both answers of a pair, the better one first.

    Raises:
        ValueError: the prompt has none; the data module gives no such one to train on.
    """
    if prompt.response is None or prompt.rejected is None:
        raise ValueError(
            f"row {prompt.id!r} is no pair, which data.stage=preference needs; give it `chosen` and `rejected`, or set "
            "data.stage to sft"
        )
    return [prompt.response, prompt.rejected]
