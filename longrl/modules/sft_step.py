"""SFT's optimizer step, and its loss on rows that are not trained on: the answers are in the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longrl.modules.expert_load import ExpertLoads
from longrl.modules.mini_batches import TokenLoss
from longrl.modules.scoring import all_media
from longrl.modules.sft_loss import SFTLoss, response_targets
from longrl.types import Batch, Metrics

if TYPE_CHECKING:
    from longrl.modules.policy import PolicyModule


def sft_step(policy: PolicyModule, batch: Batch) -> Metrics:
    """One optimizer step on the negative log-likelihood per response token of the whole batch; returns its metrics."""
    responses = response_targets(batch)
    num_tokens = sum(response.num_sampled for (response,) in responses)
    all_tokens = policy.parallel.dp.sum(torch.tensor(num_tokens, device=policy.device))
    loss: TokenLoss = SFTLoss(int(all_tokens))
    teaching = policy.teaching
    if teaching is not None:
        loss = teaching.beside_text(loss, int(all_tokens), len(responses))
    features: dict[str, Tensor] = {}
    if not policy.vision_encoder_trains:
        features = policy.features.get_or_encode(policy.model, all_media(batch.prompts, responses))
    loads = ExpertLoads()
    metrics = policy.take_step(batch.prompts, responses, features, loss, loads)
    if teaching is not None:
        metrics = teaching.finish(metrics, policy.parallel.dp)
    if policy.features.disk:
        policy.log_dict(policy.features.metrics(), batch_size=1)
    return metrics | loads.metrics(policy.parallel.world)


def sft_validation(policy: PolicyModule, batch: Batch) -> dict[str, tuple[float, int]]:
    """Name -> sum and count of the values of this rank's rows: `loss` in nats per token. Every rank must call it."""
    has_targets = False
    if batch.prompts:
        has_targets = batch.groups is None or batch.prompts[0].response is not None
    if not policy.parallel.dp.max(has_targets):  # a rank may have run out of prompts before others
        return {}
    responses = response_targets(batch)
    features = policy.features.get_or_encode(policy.model, all_media(batch.prompts, responses))
    logp = policy.score(policy.policy, batch.prompts, responses, features)
    return {"loss": (-float(logp.sum()), len(logp))}
