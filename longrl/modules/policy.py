"""The policy being trained: one LightningModule for chain-of-thought SFT, for pairs, and for RL on its own rollouts.

Letters: P prompts of a batch, G completions of each, C = P * G, N completion tokens of a rollout or mini-batch,
R scored rows of a micro-batch. All are this rank's; sums over ranks are taken where a formula needs them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from longrl.algorithms import Algorithm, Distillation, Preference
from longrl.features.cache import FeatureCache
from longrl.features.disk_cache import DiskCache
from longrl.features.trainable_features import TrainableFeatures
from longrl.io.number_ranges import NOT_NEGATIVE, check_ranges
from longrl.io.pulse import PULSE
from longrl.models.base import CausalFamily
from longrl.modules.consistency import Consistency
from longrl.modules.distiller import Distiller, Teaching
from longrl.modules.expert_load import ExpertLoads
from longrl.modules.initial_weights import build_from
from longrl.modules.mini_batches import TokenLoss
from longrl.modules.mismatch import MismatchMonitor
from longrl.modules.optimizer import OptimizerSettings
from longrl.modules.preference_loss import RewardShift
from longrl.modules.preference_step import preference_step, preference_validation, warn_without_pairs
from longrl.modules.rollout_step import rollout_step
from longrl.modules.scoring import PackedScoring, all_media as all_media
from longrl.modules.sft_step import sft_step, sft_validation
from longrl.modules.skipped_steps import text_record
from longrl.modules.step_statistics import StepSums
from longrl.modules.teachers import Teacher, TeacherRun
from longrl.modules.trained import TrainedModule, data_module_of
from longrl.packing.lengths import micro_batch_limit
from longrl.packing.pack import Continuations
from longrl.strategies.fsdp import RootModule
from longrl.types import Batch, Features, Metrics, PolicyOutput, Prompt


class PolicyModule(TrainedModule):
    """Trains a model family by SFT or on pairs (batches without groups), or by RL (groups of a rollout callback).

    Optimization is manual: losses are sums under weights that add up to one over the whole optimizer step, so any split
    into micro-batches gives the same gradient.

    Args:
        family: which model, and how it is read; configs/family/ has one file per model.
        algorithm: the RL objective; not used by SFT.
        optimizer: AdamW and its schedule.
        init_from: initial weights: a Lightning checkpoint or run folder, an exported folder or a hub id. Also the
            reference policy of the KL penalty. To go on with an interrupted run use `--ckpt_path` instead.
        max_tokens_per_micro_batch: tokens of one forward pass on one rank, N times as many on N that share a sequence.
        mini_batches_per_rollout: optimizer steps one rollout is cut into.
        epochs_per_rollout: how often a rollout is gone through.
        max_grad_norm: gradient norm limit; 0 switches it off.
        max_nonfinite_steps: so many optimizer steps in a row whose loss or gradient norm is not finite end the run. A
            single one is left out: weights and optimizer stay as they were, and its batch is kept in
            `run_dir/nonfinite_steps`.
        feature_cache_bytes: features of a frozen encoder kept between steps.
        feature_cache_dir: folder in which features of a frozen encoder outlive the run, if there is one. `python -m
            longrl cache-features` fills it beforehand. In `fit` videos whose features are there are not decoded.
        feature_cache_disk_bytes: what all files in that folder may take; the least recently used go first.
        consistency: a bonus for right completions whose answer the reference finds likely after their reasoning
            (GRPO-CARE); it needs the reference, also without a KL penalty. None: not.
        teacher: a model, or several for different tasks, whose distributions the policy learns; None is no
            distillation.
        distillation: how the policy is compared with the teacher; None is the reverse KL over the whole vocabulary.
        preference: the objective of `data.stage: preference`; by default DPO. `init_from` is the reference.
    """

    family: CausalFamily

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
        max_nonfinite_steps: int = 3,
        feature_cache_bytes: int = 1 << 30,
        feature_cache_dir: str | None = None,
        feature_cache_disk_bytes: int = 1 << 40,
        consistency: Consistency | None = None,
        teacher: Teacher | list[Teacher] | None = None,
        distillation: Distillation | None = None,
        preference: Preference | None = None,
    ) -> None:
        if min(max_tokens_per_micro_batch, mini_batches_per_rollout, epochs_per_rollout) < 1:
            raise ValueError(
                "model.max_tokens_per_micro_batch, model.mini_batches_per_rollout and model.epochs_per_rollout must be "
                f"at least 1, got {max_tokens_per_micro_batch}, {mini_batches_per_rollout} and {epochs_per_rollout}"
            )
        check_ranges(
            locals(),
            "model.",
            feature_cache_bytes=NOT_NEGATIVE,
            feature_cache_disk_bytes=NOT_NEGATIVE,
        )
        super().__init__(
            family, algorithm, optimizer, init_from, mini_batches_per_rollout, epochs_per_rollout, max_grad_norm,
            max_nonfinite_steps,
        )  # fmt: skip
        if self.algorithm.fp32_lm_head:
            family.fp32_lm_head = True
        self.preference = preference or Preference()
        self.preference_is_given = preference is not None
        self.reward_shift = RewardShift()
        """Of the quality loss of pairs."""
        self.max_tokens_per_micro_batch = max_tokens_per_micro_batch
        self.consistency = consistency
        self.temperature = 1.0
        """The one completions are sampled with; the rollout callback sets it."""
        self.mismatch_monitor: MismatchMonitor | None = None
        """Compares engine and trainer in every step; the rollout callback sets it."""
        self.distiller = Distiller.of(teacher, distillation)
        """What teachers add to the objective; None without any."""
        self.teaching: Teaching | None = None
        """What they say of the batch at hand."""
        self.vision_encoder_trains = False
        """True if features need gradients; known once there are weights."""
        self.num_scoring_passes = 0
        """Forward passes without gradient over a batch so far."""
        self.num_synced_bytes = 0
        """Of weights that this rank has handed to the engine so far; the rollout callback counts them."""
        disk = DiskCache(family, feature_cache_dir, feature_cache_disk_bytes) if feature_cache_dir else None
        self.features = FeatureCache(family, feature_cache_bytes, disk=disk)

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def is_rl(self) -> bool:
        return data_module_of(self.trainer).renderer.stage == "rl"

    def learns_pairs(self) -> bool:
        """True if batches are pairs of answers, one of which is preferred."""
        return data_module_of(self.trainer).renderer.stage == "preference"

    @property
    @override
    def rollouts_need_reference(self) -> bool:
        return super().rollouts_need_reference or self.consistency is not None

    @override
    def needs_reference(self) -> bool:
        return self.preference.needs_reference if self.learns_pairs() else super().needs_reference()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.distiller is not None:
            data = data_module_of(self.trainer)
            self.distiller.setup(self.family, self.algorithm, data.renderer.stage, self.temperature)
            train = data.datasets.get("train")
            self.distiller.check_tasks(() if train is None else train.rows)
        if stage == "fit" and not self.is_rl():  # in RL the rollout callback knows how long completions may become
            limit = micro_batch_limit(self.max_tokens_per_micro_batch, self.parallel.degrees)
            data_module_of(self.trainer).limit_lengths([limit], ("train", "val"))
        if stage == "fit":
            warn_without_pairs(self)

    @override
    def build_model(self) -> nn.Module:
        return build_from(self.family, self.init_from)

    @override
    def configure_model(self) -> None:
        if self.is_built:
            return
        super().configure_model()
        self.vision_encoder_trains = bool(self.family.trained_encoders(self.model))
        self.features.parallel = self.parallel
        if self.features.disk:
            self.features.disk.check_encoder(self.model)

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.distiller is not None:
            limit = self.max_tokens_per_micro_batch
            distillation = self.distiller.distillation
            self.distiller.start(TeacherRun(self.family, distillation, self.parallel, limit, self.device))

    @override
    def teardown(self, stage: str) -> None:
        if self.distiller is not None:
            self.distiller.close()

    @override
    def on_train_start(self) -> None:
        """Tells the loader which videos it need not decode; only now have weights and optimizer been restored."""
        super().on_train_start()
        disk = self.features.disk
        if disk is None or not self.family.media_encoders(self.model):
            return
        before = disk.files(self.model)
        with contextlib.ExitStack() as stack:
            if not self.is_rl():  # SFT encodes within the step
                stack.enter_context(self.trainer.precision_plugin.forward_context())
            cache = disk.files(self.model)
        # In validation the rollout callback may encode before the precision of the step, or the step within it.
        data_module = data_module_of(self.trainer)
        if cache is before:
            data_module.skip_decoding_if_cached(cache, ("train", "val"))
        else:
            data_module.skip_decoding_if_cached(cache, ("train",))

    @functools.cached_property
    def engine_family(self) -> CausalFamily:
        """The family in the precision that the trainer computes in, for engines with weights of their own."""
        family = copy.copy(self.family)
        if self.parallel.compute_dtype is not None:
            family.dtype = self.parallel.compute_dtype
        elif self.trainer.precision == "bf16-mixed":
            family.dtype = "bfloat16"
        return family

    @property
    def scoring(self) -> PackedScoring:
        """The run's micro-batches: of the ranks, the budget of tokens and the device that there are now."""
        return PackedScoring(self.parallel, self.max_tokens_per_micro_batch, self.family.num_axes, self.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.reward_shift.count:
            checkpoint["reward_shift"] = self.reward_shift.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.reward_shift.load_state_dict(checkpoint.get("reward_shift", {}))

    # -- steps ---------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """As of all policies, once teachers have scored what is learned."""
        if self.distiller is not None:
            with self.phases("teacher"):
                self.teaching = self.distiller.score_batch(batch, self.temperature, self.device)
        super().training_step(batch, batch_idx)
        self.teaching = None  # hidden states of every token, that the next rollout needs the room of

    @override
    def update_policy(self, batch: Batch) -> Metrics:
        """The optimizer steps on a rollout, on pairs, or on stored answers; none if no rank has groups."""
        if batch.groups is None:
            return preference_step(self, batch) if self.learns_pairs() else sft_step(self, batch)
        return rollout_step(self, batch)

    def take_step(
        self,
        prompts: Sequence[Prompt],
        completions: Continuations,
        features: Features,
        loss: TokenLoss,
        loads: ExpertLoads,
        monitor: MismatchMonitor | None = None,
    ) -> Metrics:
        """One optimizer step: micro-batches, backward, clipping, scheduler. Returns metrics summed over all ranks."""
        # 1. Features of an encoder that trains are computed once, and micro-batches leave their gradients in them.
        trainable = None
        if self.vision_encoder_trains:
            trainable = TrainableFeatures(self.family, self.model, all_media(prompts, completions), self.parallel)
            features = trainable.leaves

        # 2. Forward and backward, one micro-batch after the other; gradients add up.
        local = StepSums()
        micro_batches, sequence = self.scoring.micro_batches(prompts, completions)
        for packed in micro_batches:
            PULSE.beats += 1
            here = self.scoring.on_device(packed)
            options = loss.forward_options(packed, here)
            output: PolicyOutput = self.policy(here, features, self.temperature, sequence, **options)
            loads.add(output.load, counts=packed is not None)
            if packed is None:  # this rank only helps the others to gather weights and to sum gradients
                self.manual_backward(output.logp.sum() * 0)
                continue
            result = loss(here, output)
            self.manual_backward(result.loss)
            local.add({"loss": result.loss, **result.metrics})
        if trainable is not None:
            trainable.backward()

        # 3. Before the weights change: has the engine sampled from the policy that is being trained?
        if monitor is not None:
            monitor.finish_rollout(self.parallel.world)

        # 4. Every rank that shares a sequence has counted its tokens.
        totals = local.collect()
        for name in totals:
            totals[name] /= sequence.size
        sums = self.parallel.world.sum_dict(totals)

        # 5. The step; features of the encoder as it was are of no more use.
        facts = {"temperature": self.temperature, "epoch": self.current_epoch}
        record = functools.partial(text_record, prompts, completions, loss, **facts)
        step = self.optimizer_step_clipped(sums["loss"], record)
        if self.vision_encoder_trains:
            self.features.clear()
        return sums | step

    # -- scores --------------------------------------------------------------------------------------------------

    def reference_logp(
        self, prompts: Sequence[Prompt], completions: Continuations, features: Features
    ) -> Tensor | None:
        """[N] log-probabilities of the reference policy, or None without one. Every rank of the run must call it.

        Args:
            prompts: this rank's.
            completions: of each.
            features: of all media, as the policy's encoder gives them.
        """
        reference = self.reference
        if reference is None:
            return None
        with self.reference_weights():
            if self.vision_encoder_trains:  # the reference has an encoder of its own
                cache = FeatureCache(self.family, parallel=self.parallel)
                features = cache.get_or_encode(reference.model, all_media(prompts, completions))
            return self.score(reference, prompts, completions, features, replays_experts=False)

    def score(
        self,
        policy: RootModule,
        prompts: Sequence[Prompt],
        completions: Continuations,
        features: Features,
        temperature: float | None = None,
        replays_experts: bool = True,
    ) -> Tensor:
        """[N] log-probabilities of all sampled tokens; `PackedScoring.logp`, and None is the rollouts' temperature."""
        if temperature is None:
            temperature = self.temperature
        self.num_scoring_passes += 1
        return self.scoring.logp(policy, prompts, completions, features, temperature, replays_experts)

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> list[list[str]]:
        """Texts of each prompt's completions: all that Lightning keeps; `EvaluationReport` writes more of them."""
        return [[completion.text for completion in group.completions] for group in batch.groups or []]

    @override
    def on_validation_start(self) -> None:
        """In `validate` nothing was trained, and there is no reference yet."""
        if self.learns_pairs() and self.reference is None and self.needs_reference():
            self._keep_unregistered("reference", self._make_reference())

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds up reward and parts, in validation per category too; of answers in the data the loss and the like."""
        stage = "test" if self.trainer.testing else "val"
        for group in batch.groups or []:
            # `test` reports categories with intervals: callbacks/evaluation.py
            self._eval_means.add_rewards(group, stage, by_category=stage == "val")
        if stage == "test" and self.learns_pairs():  # questions are asked, pairs are not compared
            return
        of_targets = preference_validation if self.learns_pairs() else sft_validation
        for name, (total, count) in of_targets(self, batch).items():
            self._eval_means.add(f"{stage}/{name}", total, count)

    test_step = validation_step
