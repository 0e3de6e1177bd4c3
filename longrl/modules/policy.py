"""The policy being trained: one LightningModule for chain-of-thought SFT and for RL on its own rollouts.

Letters: P prompts of a batch, G completions of each, C = P * G, N completion tokens of a rollout or mini-batch,
R scored rows of a micro-batch. All are this rank's; sums over ranks are taken where a formula needs them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from longrl.algorithms import Algorithm
from longrl.engines.parity import MismatchMonitor
from longrl.features.cache import FeatureCache, TrainableFeatures
from longrl.features.stored import StoredFeatures
from longrl.models.base import CausalFamily
from longrl.models.lora import adapters_off
from longrl.modules.initial_weights import build_from
from longrl.modules.micro_batches import scores, split
from longrl.modules.mini_batches import FlatGroups, Rollout, mini_batches, targets
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.trained import TrainedModule
from longrl.strategies.fsdp import Entry
from longrl.types import Batch, Packed, PolicyOutput, Prompt

LossFunction = Callable[[Packed, PolicyOutput], tuple[Tensor, Mapping[str, Tensor]]]
"""Micro-batch and scores -> (summed loss, metrics that add up over micro-batches)."""


class PolicyModule(TrainedModule):
    """Trains a model family by SFT (batches without groups) or RL (batches whose groups a rollout callback filled).

    Optimization is manual: losses are sums under weights that add up to one over the whole optimizer step, so any split
    into micro-batches gives the same gradient.

    Args:
        family: the model.
        algorithm: the RL objective; not used by SFT.
        optimizer: AdamW and its schedule.
        init_from: initial weights: a Lightning checkpoint or run folder, an exported folder or a hub id. Also the
            reference policy of the KL penalty. To go on with an interrupted run use `--ckpt_path` instead.
        max_tokens_per_micro_batch: token budget of one forward pass on one rank; with N ranks sharing a sequence it
            may have N times as many. Bounds memory, changes no gradient.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
        feature_cache_bytes: features of a frozen encoder kept between steps.
        feature_cache_dir: folder in which features of a frozen encoder are kept for later steps and runs; None for none.
            `python -m longrl cache-features` fills it beforehand. In `fit` videos whose features are there are not
            decoded.
        feature_cache_disk_bytes: what all files in that folder may take; the least recently used go first.
    """

    def __init__(
        self,
        family: CausalFamily,
        algorithm: Algorithm | None = None,
        optimizer: OptimizerSettings | None = None,
        init_from: str | None = None,
        max_tokens_per_micro_batch: int = 16_384,
        mini_batches_per_rollout: int = 1,
        epochs_per_rollout: int = 1,
        max_grad_norm: float = 1.0,
        feature_cache_bytes: int = 1 << 30,
        feature_cache_dir: str | None = None,
        feature_cache_disk_bytes: int = 1 << 40,
    ) -> None:
        if min(max_tokens_per_micro_batch, mini_batches_per_rollout, epochs_per_rollout) < 1:
            raise ValueError(
                "model.max_tokens_per_micro_batch, model.mini_batches_per_rollout and model.epochs_per_rollout must be "
                f"at least 1, got {max_tokens_per_micro_batch}, {mini_batches_per_rollout} and {epochs_per_rollout}"
            )
        super().__init__(
            family, algorithm, optimizer, init_from, mini_batches_per_rollout, epochs_per_rollout, max_grad_norm
        )
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.temperature = 1.0
        """The one completions are sampled with; the rollout callback sets it."""
        self.gap: MismatchMonitor | None = None
        """Compares engine and trainer in every step; the rollout callback sets it."""
        stored = StoredFeatures(family, feature_cache_dir, feature_cache_disk_bytes) if feature_cache_dir else None
        self.features = FeatureCache(family, feature_cache_bytes, stored=stored)

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def is_rl(self) -> bool:
        return self.trainer.datamodule.renderer.stage == "rl"

    @override
    def build_model(self) -> nn.Module:
        return build_from(self.family, self.init_from)

    @override
    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build_model()
            if self.features.stored:
                self.features.stored.check(self.model)
            self._entry = (self.parallel.wrap(self.family, self.model),)
            self.features.parallel = self.parallel

    @override
    def on_train_start(self) -> None:
        """Tells the loader which videos it need not decode; only now have weights and optimizer been restored."""
        super().on_train_start()
        stored = self.features.stored
        if stored is None or not self.family.media_encoders(self.model):
            return
        before = stored.cache(self.model)
        with contextlib.nullcontext() if self.is_rl() else self.trainer.precision_plugin.forward_context():
            cache = stored.cache(self.model)
        # In validation the rollout callback may encode before the precision of the step, or the step within it.
        self.trainer.datamodule.skip_decoding_if_cached(cache, ("train", "val") if cache is before else ("train",))

    @property
    def vision_encoder_trains(self) -> bool:
        """Whether features need gradients."""
        return self.family.vision_encoder_trains(self.model)

    def encode(self, prompts: Sequence[Prompt], counted: bool = True) -> dict[str, Tensor]:
        """{media key: [N, D] features} without gradient, each distinct medium encoded once while the encoder stands.

        `counted` False leaves the hit rate alone, for prompts that this step has asked for already.
        """
        return self.features.get_or_encode(self.model, prompts, counted)

    @functools.cached_property
    def engine_family(self) -> CausalFamily:
        """The family in the precision that the trainer computes in, for engines with weights of their own."""
        mixed = "bfloat16" if self.trainer.precision == "bf16-mixed" else None
        family = copy.copy(self.family)
        family.dtype = self.parallel.compute_dtype or mixed or self.family.dtype
        return family

    def with_whole_weights(self, function: Callable[[], Any]) -> Any:
        """The result of `function`, which may read all weights of the policy as often as it likes."""
        return self.entry.whole(function)

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        with self.phases("update"):
            metrics = self.sft_step(batch) if batch.groups is None else self.rl_step(batch)
        self.log_dict(self.features.metrics(), batch_size=1)
        if metrics:
            self.log_step(metrics)

    def sft_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the negative log-likelihood per response token of the whole batch."""
        responses = targets(batch)
        counts = torch.tensor(sum(len(ids) for (ids,) in responses), device=self.device)
        num_tokens = int(self.parallel.dp.sum(counts))

        def loss_of(packed: Packed, output: PolicyOutput) -> tuple[Tensor, dict[str, Tensor]]:
            return -output.logp.sum() / num_tokens, {"entropy": output.entropy.sum() / num_tokens}

        features = {} if self.vision_encoder_trains else self.encode(batch.prompts)
        return self._update(batch.prompts, responses, features, loss_of)

    def rl_step(self, batch: Batch) -> dict[str, float]:
        """The optimizer steps on one rollout; metrics are the mean over them. No groups on any rank, no step."""
        if self.parallel.dp.max(len(batch.groups)) == 0:
            return {}
        parts = self._mini_batches(batch)
        totals: Counter[str] = Counter()
        watch = self.gap  # of the first update, whose weights are those that sampled
        for rollout in parts * self.epochs_per_rollout:
            totals.update(self._update_on(rollout, batch.features, watch))
            watch = None
        steps = self.epochs_per_rollout * len(parts)
        gap = self.gap.metrics if self.gap else {}
        return {name: value / steps for name, value in totals.items()} | gap

    def _update_on(
        self, rollout: Rollout, features: Mapping[str, Tensor], watch: MismatchMonitor | None
    ) -> dict[str, float]:
        def loss_of(packed: Packed, output: PolicyOutput) -> tuple[Tensor, Mapping[str, Tensor]]:
            rows, weights = packed.token_index, rollout.weights[packed.completion_index].to(output.logp.device)
            if watch:
                known = rollout.fresh[rows] | watch.one_step_off
                watch.add_tokens(rollout.sampler_logp[rows][known], output.logp[known])
            result = self.algorithm.loss(
                output.logp,
                output.logp.detach() if rollout.old_logp is None else rollout.old_logp[rows],
                None if rollout.ref_logp is None else rollout.ref_logp[rows],
                rollout.sampler_logp[rows],
                rollout.advantages[rows],
                weights,
                packed.completion_index,
            )
            return result.loss, {"entropy": (output.entropy * weights).sum(), **result.metrics}

        before_step = partial(watch.finish_rollout, self.parallel.world) if watch else None
        metrics = self._update(rollout.prompts, rollout.completions, features, loss_of, before_step)
        total = metrics.pop("weight_sum", 0.0) or 1.0  # below one with Dr.GRPO's constant, or with masked completions
        own = ("loss", "grad_norm", "lr")
        return {name: value if name in own else value / total for name, value in metrics.items()}

    def _update(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        features: Mapping[str, Tensor],
        loss_of: LossFunction,
        before_step: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """One optimizer step: micro-batches, backward, clipping, scheduler. Returns metrics summed over all ranks."""
        trainable = (
            TrainableFeatures(self.family, self.model, prompts, self.parallel) if self.vision_encoder_trains else None
        )
        leaves = trainable.leaves if trainable else features
        totals: Counter[str] = Counter()
        micro_batches, sequence = split(self.parallel, self.max_tokens_per_micro_batch, prompts, completions)
        for packed in micro_batches:
            output = scores(self.family, self.entry, packed, leaves, self.temperature, sequence)
            if packed is None:
                self.manual_backward(output.logp.sum() * 0)
                continue
            loss, metrics = loss_of(packed.to(self.device), output)
            self.manual_backward(loss)
            totals.update({"loss": loss.item(), **{name: value.item() for name, value in metrics.items()}})
        if trainable:
            trainable.backward()
        if before_step:
            before_step()
        sums = self.parallel.world.sum_dict({name: value / sequence.size for name, value in totals.items()})
        step = self.optimizer_step_clipped()
        if self.vision_encoder_trains:
            self.features.clear()
        return {**sums, **step}

    # -- from groups to mini-batches -----------------------------------------------------------------------------

    def _mini_batches(self, batch: Batch) -> list[Rollout]:
        """Scores the groups once with the policy and reference as they are, and cuts them into mini-batches."""
        flat = FlatGroups(batch.groups, self.device)
        old = self._old_logp(flat, batch.features, flat.sampler_logp)
        reference = self._reference_logp(flat, batch.features)
        return mini_batches(flat, self.mini_batches_per_rollout, self.algorithm, self.parallel.dp, old, reference)

    def _old_logp(self, flat: FlatGroups, features: Mapping[str, Tensor], sampler: Tensor) -> Tensor | None:
        """[N] log-probabilities before the update, or None if the first update is the only one.

        Groups carried over were sampled by older weights: theirs are the sampler's; so are all of a trusted engine.
        """
        in_reward = self.algorithm.kl_coef > 0 and self.algorithm.kl_placement == "reward"
        carried = any(group.carried_over for group in flat.groups)
        if self.steps_per_rollout == 1 and not in_reward and not self.parallel.dp.max(carried):
            return None
        unknown = self.parallel.dp.max(bool((~sampler.isfinite()).any()))
        scored = self.parallel.dp.max(any(not group.carried_over for group in flat.groups))
        trusted = self.gap is not None and self.gap.bypasses_old_logp and not in_reward
        if not unknown and (trusted or not scored):
            return sampler
        old = self.score(self.entry, flat.prompts, flat.completions, features)
        return torch.where(flat.fresh | ~sampler.isfinite(), old, sampler)

    def _reference_logp(self, flat: FlatGroups, features: Mapping[str, Tensor]) -> Tensor | None:
        """[N] log-probabilities of the reference policy, or None without KL penalty."""
        if not self._reference:
            return None
        (entry,) = self._reference
        if self.vision_encoder_trains:  # the reference has the encoder it started with
            features = FeatureCache(self.family, parallel=self.parallel).get_or_encode(entry.model, flat.prompts)
        with adapters_off(self.family, entry.model):
            logp = self.score(entry, flat.prompts, flat.completions, features)
        entry.release()
        return logp

    @torch.no_grad()
    def score(
        self,
        entry: Entry,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Tensor]],
        features: Mapping[str, Tensor],
        temperature: float | None = None,
    ) -> Tensor:
        """[N] log-probabilities of all completion tokens, under the policy or the reference.

        `temperature` None is the one they were sampled with. Every rank of the run must call it.
        """
        micro_batches, sequence = split(self.parallel, self.max_tokens_per_micro_batch, prompts, completions)
        scale = self.temperature if temperature is None else temperature
        logp = torch.zeros(sum(len(ids) for own in completions for ids in own), device=self.device)
        for packed in micro_batches:
            output = scores(self.family, entry, packed, features, scale, sequence)
            if packed is not None:
                logp[packed.token_index.to(self.device)] = output.logp
        if sequence.size < self.parallel.sp_group.size:  # other ranks of the team had the other micro-batches
            logp = self.parallel.sp_group.sum(logp) / sequence.size
        return logp

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[list[str]]:
        """Texts of each prompt's completions: all that Lightning keeps; `EvaluationReport` writes more of them."""
        return [[completion.text for completion in group.completions] for group in batch.groups or []]

    def _evaluate(self, batch: Batch, stage: str) -> None:
        """Adds up reward and parts, in validation per category too; of SFT batches the loss."""
        for group in batch.groups or []:
            # `test` reports categories with intervals: callbacks/evaluation.py
            self._evaluated.add_rewards(group, stage, by_category=stage == "val")
        has_targets = bool(batch.prompts) and (batch.groups is None or batch.prompts[0].response_ids is not None)
        if self.parallel.dp.max(has_targets):  # a rank may have run out of prompts before others
            responses = targets(batch)
            logp = self.score(self.entry, batch.prompts, responses, self.encode(batch.prompts))
            self._evaluated.add(f"{stage}/loss", -float(logp.sum()), len(logp))
